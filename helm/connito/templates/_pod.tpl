{{- define "connito.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end -}}

{{- define "connito.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
capabilities: { drop: [ALL] }
{{- end -}}

{{/* Bus, identity and roster: what every container needs. (dict "root" $ ) */}}
{{- define "connito.commonEnv" -}}
- { name: CONNITO_NATS_URL, value: {{ include "connito.busUrl" .root | quote }} }
- { name: CONNITO_KEY_FILE, value: {{ printf "/etc/connito/key/%s" .root.Values.keyName | quote }} }
- { name: CONNITO_ROSTER, value: {{ printf "/etc/connito/roster/%s" .root.Values.roster.key | quote }} }
{{- if .root.Values.bus.existingCaConfigMap }}
- { name: SSL_CERT_FILE, value: /etc/connito/ca/ca.crt }
{{- end }}
{{- with .root.Values.tls }}
{{- if .existingSecret }}
- { name: CONNITO_TLS_CA, value: /etc/connito/tls/ca.crt }
- { name: CONNITO_TLS_CERT, value: /etc/connito/tls/tls.crt }
- { name: CONNITO_TLS_KEY, value: /etc/connito/tls/tls.key }
{{- end }}
{{- if ne .grpc "off" }}
{{- $_ := required "tls.grpc asks for certificates: name the Secret that holds them in tls.existingSecret" .existingSecret }}
- { name: CONNITO_GRPC_TLS, value: {{ .grpc | quote }} }
{{- end }}
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
- { name: CONNITO_S3_BUCKET, value: {{ .Values.store.bucket | quote }} }
- { name: CONNITO_S3_REGION, value: {{ .Values.store.region | quote }} }
{{- $own := get .Values.store.existingSecrets $component }}
{{- $secret := required "store.existingSecret is empty: name the Secret with the store's access key and secret key" ($own | default .Values.store.existingSecret) }}
- name: CONNITO_S3_ACCESS_KEY
  valueFrom: { secretKeyRef: { name: {{ $secret | quote }}, key: {{ .Values.store.accessKeyKey | quote }} } }
- name: CONNITO_S3_SECRET_KEY
  valueFrom: { secretKeyRef: { name: {{ $secret | quote }}, key: {{ .Values.store.secretKeyKey | quote }} } }
{{- end }}
{{- end -}}

{{/* (dict "root" $ "secret" name) */}}
{{- define "connito.commonMounts" -}}
- { name: key, mountPath: /etc/connito/key, readOnly: true }
- { name: tmp, mountPath: /tmp }
- { name: roster, mountPath: /etc/connito/roster, readOnly: true }
{{- if .root.Values.bus.existingCaConfigMap }}
- { name: ca, mountPath: /etc/connito/ca, readOnly: true }
{{- end }}
{{- if .root.Values.tls.existingSecret }}
- { name: tls, mountPath: /etc/connito/tls, readOnly: true }
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
{{- with .root.Values.tls.existingSecret }}
- name: tls
  projected: { defaultMode: 0440, sources: [{ secret: { name: {{ . | quote }} } }] }
{{- end }}
{{- end -}}

{{/* The pod template of one component. (dict "root" $ "item" entry) */}}
{{- define "connito.pod" -}}
{{- $root := .root -}}
{{- $item := .item -}}
{{- $conf := $item.conf -}}
metadata:
  labels:
    {{- include "connito.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $item.component }}
    connito-workload: {{ $item.name }}
    {{- with $conf.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $conf.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "connito.fullname" $root }}
  automountServiceAccountToken: false
  # A Service named connito-grpc would otherwise arrive as the setting CONNITO_GRPC_PORT.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $conf.terminationGracePeriodSeconds | default (ternary 120 30 $item.stateful) }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets: {{- range . }}{{ printf "\n- name: %s" . | indent 4 }}{{- end }}
  {{- end }}
  {{- with $conf.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $conf.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $conf.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $conf.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $conf.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if not $item.stateful }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "connito.selector" $root | nindent 10 }}
          connito-workload: {{ $item.name }}
  {{- end }}
  securityContext: {{- include "connito.podSecurity" $root | nindent 4 }}
  containers:
    - name: {{ $item.component }}
      image: {{ include "connito.image" (list $root $item.image) | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext: {{- include "connito.containerSecurity" $root | nindent 8 }}
      env:
        {{- include "connito.commonEnv" . | nindent 8 }}
        {{- if not (has $item.component (list "trainer" "coordinator")) }}
        {{- include "connito.storeEnv" (list $root $item.component) | nindent 8 }}
        {{- end }}
        {{- if $item.api }}
        {{- if $conf.service.advertise }}
        - { name: CONNITO_GRPC_ADVERTISE, value: {{ $conf.service.advertise | quote }} }
        {{- else }}
        - { name: CONNITO_GRPC_ADVERTISE, value: "{{ include "connito.fullname" $root }}-{{ $item.name }}.{{ $root.Release.Namespace }}.svc:9090" }
        {{- end }}
        {{- end }}
        {{- if ($conf.admission).existingSecret }}
        - { name: CONNITO_ADMISSION, value: /etc/connito/admission }
        - { name: CONNITO_ADMISSION_BUS, value: {{ $conf.admission.bus | quote }} }
        {{- end }}
        {{- if $item.page }}
        {{- if not (or $conf.tokenSecret $conf.userHeader) }}
        {{- fail "the console would show every run to whoever reaches it: set console.tokenSecret, or console.userHeader and console.proxies" }}
        {{- end }}
        - { name: CONNITO_CONSOLE_HOST, value: 0.0.0.0 }
        - { name: CONNITO_CONSOLE_PORT, value: "8088" }
        - { name: CONNITO_CONSOLE_SECURE_COOKIE, value: {{ $conf.secureCookie | quote }} }
        {{- with $conf.tokenSecret }}
        - name: CONNITO_CONSOLE_TOKEN
          valueFrom: { secretKeyRef: { name: {{ . | quote }}, key: {{ $conf.tokenKey | quote }} } }
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
        {{- range $key, $value := $conf.env }}
        - { name: {{ $key }}, value: {{ $value | toString | quote }} }
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
      {{- with $conf.resources }}
      resources: {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "connito.commonMounts" . | nindent 8 }}
        - { name: cache, mountPath: /var/cache/connito }
        {{- if ($conf.admission).existingSecret }}
        - { name: admission, mountPath: /etc/connito/admission, readOnly: true }
        {{- end }}
        {{- if $conf.work }}
        - { name: work, mountPath: /var/lib/connito }
        {{- end }}
  volumes:
    {{- include "connito.commonVolumes" (dict "root" $root "secret" $item.secret) | nindent 4 }}
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
    {{- else if not $item.stateful }}
    - name: cache
      ephemeral:
        volumeClaimTemplate:
          spec: {{- include "connito.claim" $conf.cache | nindent 12 }}
    {{- end }}
{{- end -}}

{{- define "connito.claim" -}}
accessModes: [ReadWriteOnce]
{{- with .storageClassName }}
storageClassName: {{ . | quote }}
{{- end }}
resources: { requests: { storage: {{ .size | quote }} } }
{{- end -}}
