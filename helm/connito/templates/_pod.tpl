{{/* Security context of a pod: the chart's own, less what OpenShift chooses itself, then what the values say. */}}
{{- define "connito.podSecurity" -}}
{{- $own := dict "runAsNonRoot" true "seccompProfile" (dict "type" "RuntimeDefault") "fsGroupChangePolicy" "OnRootMismatch" -}}
{{- if not .Values.openshift -}}
{{- $_ := set $own "runAsUser" 10001 -}}
{{- $_ := set $own "runAsGroup" 10001 -}}
{{- $_ := set $own "fsGroup" 10001 -}}
{{- end -}}
{{- include "connito.merge" (list $own .Values.podSecurityContext) -}}
{{- toYaml $own -}}
{{- end -}}

{{- define "connito.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
capabilities: { drop: [ALL] }
{{- end -}}

{{/* The bucket. Charts before called it `connito` in every release: an upgrade takes no other one by itself. */}}
{{- define "connito.bucket" -}}
{{- $own := include "connito.fullname" . -}}
{{- if and .Release.IsUpgrade (not .Values.store.bucket) (ne $own "connito") -}}
{{- fail (printf "store.bucket is not set: write the bucket that this release has its objects in, %s if it was installed by this version of the chart, connito if by one of before" $own) -}}
{{- end -}}
{{- .Values.store.bucket | default $own -}}
{{- end -}}

{{/* Bus, identity and roster: what every container needs. (dict "root" $ ) */}}
{{- define "connito.commonEnv" -}}
# An older image passes over what this chart sets and it does not know.
- { name: CONNITO_FOR_VERSION, value: {{ .root.Chart.AppVersion | quote }} }
- { name: CONNITO_NATS_URL, value: {{ include "connito.busUrl" .root | quote }} }
- { name: CONNITO_KEY_FILE, value: {{ printf "/etc/connito/key/%s" .root.Values.keyName | quote }} }
- { name: CONNITO_ROSTER, value: {{ printf "/etc/connito/roster/%s" .root.Values.roster.key | quote }} }
{{- if .root.Values.bus.existingCaConfigMap }}
- { name: SSL_CERT_FILE, value: /etc/connito/ca/ca.crt }
{{- end }}
{{- if include "connito.tlsSecret" .root }}
- { name: CONNITO_TLS_CA, value: /etc/connito/tls/ca.crt }
- { name: CONNITO_TLS_CERT, value: /etc/connito/tls/tls.crt }
- { name: CONNITO_TLS_KEY, value: /etc/connito/tls/tls.key }
{{- end }}
{{- if ne .root.Values.tls.grpc "off" }}
{{- $_ := required "tls.grpc asks for certificates: name the Secret that holds them in tls.existingSecret" (include "connito.tlsSecret" .root) }}
- { name: CONNITO_GRPC_TLS, value: {{ .root.Values.tls.grpc | quote }} }
{{- end }}
- { name: CONNITO_LOG_FORMAT, value: {{ .root.Values.logs.format | quote }} }
- { name: CONNITO_LOG_LEVEL, value: {{ .root.Values.logs.level | quote }} }
{{- with .root.Values.tracing.endpoint }}
- { name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ . | quote }} }
- { name: OTEL_TRACES_SAMPLER, value: parentbased_traceidratio }
- { name: OTEL_TRACES_SAMPLER_ARG, value: {{ $.root.Values.tracing.samplingRatio | quote }} }
- { name: OTEL_RESOURCE_ATTRIBUTES, value: {{ printf "k8s.namespace.name=%s" $.root.Release.Namespace | quote }} }
{{- end }}
{{- end -}}

{{/* (list $ component) */}}
{{- define "connito.storeEnv" -}}
{{- $component := index . 1 }}
{{- with index . 0 }}
- { name: CONNITO_S3_ENDPOINT, value: {{ required "store.endpoint is empty: name the S3 address, such as https://s3.eu-central-1.amazonaws.com" .Values.store.endpoint | quote }} }
{{- with .Values.store.publicEndpoint }}
- { name: CONNITO_S3_PUBLIC_ENDPOINT, value: {{ . | quote }} }
{{- end }}
- { name: CONNITO_S3_BUCKET, value: {{ include "connito.bucket" . | quote }} }
- { name: CONNITO_S3_REGION, value: {{ .Values.store.region | quote }} }
{{- if ne .Values.store.auth "keys" }}
- { name: CONNITO_S3_CREDENTIALS, value: {{ .Values.store.auth }} }
{{- if eq .Values.store.auth "web-identity" }}
- { name: CONNITO_S3_STS_ENDPOINT, value: {{ required "store.sts.endpoint is empty: name the STS that takes the pods' tokens" .Values.store.sts.endpoint | quote }} }
{{- end }}
{{- else }}
{{- $own := get .Values.store.existingSecrets $component }}
{{- $secret := required "store.existingSecret is empty: name the Secret with the store's access key and secret key, or say in store.auth that pods have an identity" ($own | default .Values.store.existingSecret) }}
- name: CONNITO_S3_ACCESS_KEY
  valueFrom: { secretKeyRef: { name: {{ $secret | quote }}, key: {{ .Values.store.accessKeyKey | quote }} } }
- name: CONNITO_S3_SECRET_KEY
  valueFrom: { secretKeyRef: { name: {{ $secret | quote }}, key: {{ .Values.store.secretKeyKey | quote }} } }
{{- end }}
{{- end }}
{{- end -}}

{{/* (dict "root" $ "store" bool) */}}
{{- define "connito.commonMounts" -}}
- { name: key, mountPath: /etc/connito/key, readOnly: true }
- { name: tmp, mountPath: /tmp }
- { name: roster, mountPath: /etc/connito/roster, readOnly: true }
{{- if .root.Values.bus.existingCaConfigMap }}
- { name: ca, mountPath: /etc/connito/ca, readOnly: true }
{{- end }}
{{- if include "connito.tlsSecret" .root }}
- { name: tls, mountPath: /etc/connito/tls, readOnly: true }
{{- end }}
{{- if and .store (eq .root.Values.store.auth "web-identity") }}
- { name: identity, mountPath: /var/run/secrets/connito, readOnly: true }
{{- end }}
{{- end -}}

{{- define "connito.commonVolumes" -}}
- name: key
  secret:
    secretName: {{ .secret | quote }}
    defaultMode: 0440
    items: [{ key: {{ .root.Values.keyName | quote }}, path: {{ .root.Values.keyName | quote }} }]
- name: tmp
  emptyDir: { sizeLimit: 1Gi }
- name: roster
  configMap: { name: {{ required "roster.existingConfigMap is empty: name the ConfigMap that holds the operator's roster" .root.Values.roster.existingConfigMap | quote }} }
{{- with .root.Values.bus.existingCaConfigMap }}
- name: ca
  configMap: { name: {{ . | quote }} }
{{- end }}
{{- with include "connito.tlsSecret" .root }}
- name: tls
  projected: { defaultMode: 0440, sources: [{ secret: { name: {{ . | quote }} } }] }
{{- end }}
{{- if and .store (eq .root.Values.store.auth "web-identity") }}
- name: identity
  projected:
    defaultMode: 0440
    sources: [{ serviceAccountToken: { path: token, audience: {{ .root.Values.store.sts.audience | quote }}, expirationSeconds: 3600 } }]
{{- end }}
{{- end -}}

{{/* metadata of a pod: (list root component conf workload) */}}
{{- define "connito.podMetadata" -}}
{{- $conf := index . 2 -}}
labels:
  {{- include "connito.labels" (index . 0) | nindent 2 }}
  app.kubernetes.io/component: {{ index . 1 }}
  {{- with index . 3 }}
  connito-workload: {{ . }}
  {{- end }}
  {{- range $name, $value := $conf.podLabels }}
  {{- if regexMatch "^(app.kubernetes.io/(name|instance|version|component|managed-by|part-of)|helm.sh/chart|connito-workload)$" $name }}
  {{- fail (printf "podLabels: %s is the chart's own; policies and Services find pods by it" $name) }}
  {{- end }}
  {{ $name }}: {{ $value | quote }}
  {{- end }}
{{- with $conf.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Where a pod runs and as whom: (list root component conf) */}}
{{- define "connito.placement" -}}
{{- $root := index . 0 -}}
{{- $conf := index . 2 -}}
serviceAccountName: {{ include "connito.account" (list $root (index . 1) $conf) }}
automountServiceAccountToken: false
# A Service named connito-grpc would otherwise arrive as the setting CONNITO_GRPC_PORT.
enableServiceLinks: false
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets: {{- range . }}{{ printf "\n- name: %s" . }}{{- end }}
{{- end }}
{{- range $key := list "priorityClassName" "runtimeClassName" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with get $conf $key }}
{{ $key }}: {{- if kindIs "string" . }} {{ . | quote }}{{ else }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
{{- end }}
securityContext: {{- include "connito.podSecurity" $root | nindent 2 }}
{{- with $conf.initContainers }}
initContainers: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Variables that the values add: (list conf). A key of `env` replaces the chart's own variable of that name. */}}
{{- define "connito.moreEnv" -}}
{{- range $key, $value := .env }}
{{- /* Helm reads every number as a fraction, and would write a large one as 1.7e+10. A name may read as yes or no. */}}
{{- if and (kindIs "float64" $value) (eq $value (floor $value)) }}{{ $value = int64 $value }}{{ end }}
- { name: {{ $key | quote }}, value: {{ $value | toString | quote }} }
{{- end }}
{{- with .extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The pod template of one component. (dict "root" $ "item" entry) */}}
{{- define "connito.pod" -}}
{{- $root := .root -}}
{{- $item := .item -}}
{{- $conf := $item.conf -}}
{{- $store := not (has $item.component (list "trainer" "coordinator")) -}}
metadata: {{- include "connito.podMetadata" (list $root $item.component $conf $item.name) | nindent 2 }}
spec:
  {{- include "connito.placement" (list $root $item.name $conf) | nindent 2 }}
  terminationGracePeriodSeconds: {{ $conf.terminationGracePeriodSeconds | default (ternary 120 30 $item.stateful) }}
  {{- if not (or $item.stateful $conf.topologySpreadConstraints) }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "connito.selector" $root | nindent 10 }}
          connito-workload: {{ $item.name }}
  {{- end }}
  containers:
    - name: {{ $item.component }}
      image: {{ include "connito.image" (list $root $item.image $conf.image) | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext: {{- include "connito.containerSecurity" $root | nindent 8 }}
      env:
        {{- include "connito.commonEnv" . | nindent 8 }}
        {{- if $store }}
        {{- include "connito.storeEnv" (list $root $item.component) | nindent 8 }}
        {{- end }}
        {{- if $item.api }}
        {{- if $conf.service.advertise }}
        - { name: CONNITO_GRPC_ADVERTISE, value: {{ $conf.service.advertise | quote }} }
        {{- else }}
        - { name: CONNITO_GRPC_ADVERTISE, value: "{{ include "connito.object" (list $root $item.name) }}.{{ $root.Release.Namespace }}.svc:9090" }
        {{- end }}
        {{- end }}
        {{- if ($conf.admission).existingSecret }}
        - { name: CONNITO_ADMISSION, value: /etc/connito/admission }
        - { name: CONNITO_ADMISSION_BUS, value: {{ $conf.admission.bus | quote }} }
        {{- end }}
        {{- if or $item.page (has $item.component (list "coordinator" "library")) }}
        {{- with $root.Values.oidc.issuer }}
        - { name: CONNITO_OIDC_ISSUER, value: {{ . | quote }} }
        - { name: CONNITO_OIDC_AUDIENCE, value: {{ required "oidc.audience is empty: tokens that the provider made for anybody would open the APIs" $root.Values.oidc.audience | quote }} }
        - { name: CONNITO_OIDC_CLAIM, value: {{ $root.Values.oidc.claim | quote }} }
        {{- end }}
        {{- end }}
        {{- if $item.page }}
        {{- if not (or $conf.tokenSecret $conf.userHeader $root.Values.oidc.issuer) }}
        {{- fail "the console would show every run to whoever reaches it: set console.tokenSecret, or oidc, or console.userHeader and console.proxies" }}
        {{- end }}
        {{- with $conf.oidc }}
        {{- if .client }}
        {{- $_ := required "console.oidc.client is set and oidc.issuer is not" $root.Values.oidc.issuer }}
        - { name: CONNITO_CONSOLE_OIDC_CLIENT, value: {{ .client | quote }} }
        - { name: CONNITO_CONSOLE_OIDC_SCOPES, value: {{ .scopes | quote }} }
        - { name: CONNITO_CONSOLE_URL, value: {{ required "console.oidc.url is empty: the provider sends readers back there" .url | quote }} }
        {{- if .secretName }}
        - name: CONNITO_CONSOLE_OIDC_SECRET
          valueFrom: { secretKeyRef: { name: {{ .secretName | quote }}, key: {{ .secretKey | quote }} } }
        {{- end }}
        {{- end }}
        {{- end }}
        - { name: CONNITO_CONSOLE_HOST, value: 0.0.0.0 }
        - { name: CONNITO_CONSOLE_PORT, value: "8088" }
        - { name: CONNITO_CONSOLE_SECURE_COOKIE, value: {{ $conf.secureCookie | quote }} }
        {{- with $conf.tokenSecret }}
        - name: CONNITO_CONSOLE_TOKEN
          valueFrom: { secretKeyRef: { name: {{ . | quote }}, key: {{ $conf.tokenKey | quote }} } }
        {{- end }}
        {{- with include "connito.serveUrl" $root }}
        - { name: CONNITO_CONSOLE_SERVE_URL, value: {{ . | quote }} }
        {{- end }}
        {{- with $conf.serve.secretName }}
        - name: CONNITO_CONSOLE_SERVE_KEY
          valueFrom: { secretKeyRef: { name: {{ . | quote }}, key: {{ $conf.serve.secretKey | quote }} } }
        {{- end }}
        {{- with $conf.userHeader }}
        - { name: CONNITO_CONSOLE_USER_HEADER, value: {{ . | quote }} }
        - { name: CONNITO_CONSOLE_PROXIES, value: {{ required "console.proxies is empty: name the proxy's networks, or anybody could send the header" (join "," $conf.proxies) | quote }} }
        {{- end }}
        {{- end }}
        {{- with $item.instance.run }}
        - { name: CONNITO_RUN, value: {{ . | quote }} }
        {{- end }}
        {{- if not (or $conf.cache (hasKey ($conf.env | default dict) "CONNITO_CACHE_MAX_BYTES")) }}
        # Below the volume's limit, past which the pod itself would be evicted.
        - { name: CONNITO_CACHE_MAX_BYTES, value: "1600000000" }
        {{- end }}
        {{- include "connito.moreEnv" $conf | nindent 8 }}
      {{- with $conf.envFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - { name: http, containerPort: 8080 }
        {{- if $item.api }}
        - { name: grpc, containerPort: 9090 }
        {{- end }}
        {{- if $item.page }}
        - { name: page, containerPort: 8088 }
        {{- end }}
      # Restarting does not bring a broker back: liveness asks the process alone, readiness also asks for the bus.
      startupProbe:
        httpGet: { path: /healthz, port: http }
        periodSeconds: 2
        failureThreshold: 90
      livenessProbe:
        httpGet: { path: /healthz, port: http }
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      readinessProbe:
        httpGet: { path: /readyz, port: http }
        periodSeconds: 5
        timeoutSeconds: 5
      {{- if or $item.api $item.page }}
      # Until no proxy sends anything to this pod any more.
      lifecycle:
        preStop: { exec: { command: [sleep, "5"] } }
      {{- end }}
      {{- with $conf.resources }}
      resources: {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "connito.commonMounts" (dict "root" $root "store" $store) | nindent 8 }}
        - { name: cache, mountPath: /var/cache/connito }
        {{- if ($conf.admission).existingSecret }}
        - { name: admission, mountPath: /etc/connito/admission, readOnly: true }
        {{- end }}
        {{- if $conf.work }}
        - { name: work, mountPath: /var/lib/connito }
        {{- end }}
        {{- with $conf.extraVolumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
    {{- with $conf.extraContainers }}{{ toYaml . | nindent 4 }}{{ end }}
  volumes:
    {{- include "connito.commonVolumes" (dict "root" $root "secret" $item.secret "store" $store) | nindent 4 }}
    {{- with ($conf.admission).existingSecret }}
    - name: admission
      secret:
        secretName: {{ . | quote }}
        defaultMode: 0440
        items:
          - { key: accounts.json, path: accounts.json }
          - { key: miners-say.nk, path: accounts/miners-say.nk }
          - { key: miners-read.nk, path: accounts/miners-read.nk }
    {{- end }}
    {{- if not $conf.cache }}
    - name: cache
      emptyDir: { sizeLimit: 2Gi }
    {{- else if $item.stateful }}
    {{- range $use := list "cache" "work" }}
    {{- with get $conf $use }}
    - name: {{ $use }}
      persistentVolumeClaim: { claimName: {{ include "connito.claimName" (list $root $item $use) }} }
    {{- end }}
    {{- end }}
    {{- else }}
    - name: cache
      ephemeral:
        volumeClaimTemplate:
          spec: {{- include "connito.claim" $conf.cache | nindent 12 }}
    {{- end }}
    {{- with $conf.extraVolumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end -}}

{{- define "connito.claim" -}}
accessModes: [ReadWriteOnce]
{{- with .storageClassName }}
storageClassName: {{ . | quote }}
{{- end }}
resources: { requests: { storage: {{ .size | quote }} } }
{{- end -}}

{{/* (list root item use). A claim's class cannot change: another class is another claim. */}}
{{- define "connito.claimName" -}}
{{- $item := index . 1 -}}
{{- $use := index . 2 -}}
{{- $class := (get $item.conf $use).storageClassName -}}
{{- get ($item.instance.existingClaims | default dict) $use | default (include "connito.short" (list (printf "%s-%s%s" (include "connito.object" (list (index . 0) $item.name)) $use (ternary (printf "-%s" $class) "" (not (empty $class)))) 63)) -}}
{{- end -}}
