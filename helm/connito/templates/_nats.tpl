{{/* nats-server's configuration: what the platform needs, then what `nats.config` says. */}}
{{- define "connito.natsConfig" -}}
{{- $name := include "connito.object" (list . "nats") -}}
{{- $peers := include "connito.object" (list . "nats-headless") -}}
{{- $config := dict "port" 4222 "http_port" 8222 "max_payload" 2097152 "max_pending" 4194304 "write_deadline" "5s" "pid_file" "/var/run/nats/nats.pid" "lame_duck_duration" "30s" "lame_duck_grace_period" "10s" -}}
{{- $_ := set $config "jetstream" (dict "store_dir" "/data/jetstream" "sync_interval" "always" "max_buffered_msgs" 500) -}}
{{- if gt (int .Values.nats.replicas) 1 -}}
{{- $routes := list -}}
{{- range $i := until (int .Values.nats.replicas) -}}
{{- $routes = append $routes (printf "nats://%s-%d.%s:6222" $name $i $peers) -}}
{{- end -}}
{{- $_ := set $config "cluster" (dict "name" $name "port" 6222 "routes" $routes) -}}
{{- end -}}
{{- if .Values.nats.tlsSecret -}}
{{- $_ := set $config "tls" (dict "cert_file" "/etc/nats-tls/tls.crt" "key_file" "/etc/nats-tls/tls.key" "ca_file" "/etc/nats-tls/ca.crt") -}}
{{- end -}}
{{- include "connito.merge" (list $config (deepCopy .Values.nats.config)) -}}
{{- toPrettyJson $config -}}
{{- end -}}

{{- define "connito.objects.nats" -}}
{{- if and .Values.nats.enabled (eq .Values.mode "platform") }}
{{- $nats := .Values.nats }}
{{- if not (hasKey $nats.config "operator") }}
{{- fail "nats.config names no accounts, so nobody could connect: add -f deploy/secrets/nats-values.yaml, which `connito access export` writes" }}
{{- end }}
{{- $conf := mergeOverwrite (deepCopy .Values.pods) (deepCopy $nats) }}
---
apiVersion: v1
kind: ConfigMap
metadata: {{- include "connito.metadata" (list . "nats" "nats") | nindent 2 }}
data:
  nats.conf: |
    {{- include "connito.natsConfig" . | nindent 4 }}
---
apiVersion: v1
kind: Service
metadata: {{- include "connito.metadata" (list . "nats-headless" "nats") | nindent 2 }}
spec:
  clusterIP: None
  # Servers find each other before any of them is ready.
  publishNotReadyAddresses: true
  selector:
    {{- include "connito.selector" . | nindent 4 }}
    connito-workload: nats
  ports:
    - { name: nats, port: 4222, targetPort: nats }
    - { name: cluster, port: 6222, targetPort: cluster }
    - { name: monitor, port: 8222, targetPort: monitor }
---
apiVersion: v1
kind: Service
metadata:
  {{- include "connito.metadata" (list . "nats" "nats") | nindent 2 }}
    connito-workload: nats
    {{- with $nats.service.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $nats.service.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "connito.exposure" $nats.service | nindent 2 }}
  selector:
    {{- include "connito.selector" . | nindent 4 }}
    connito-workload: nats
  ports:
    - { name: nats, port: 4222, targetPort: nats{{ include "connito.nodePort" $nats.service }} }
    {{- if and $nats.exporter.enabled (eq $nats.service.type "ClusterIP") }}
    - { name: http, port: 7777, targetPort: metrics }
    {{- end }}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {{- include "connito.metadata" (list . "nats" "nats") | nindent 2 }}
spec:
  replicas: {{ $nats.replicas }}
  serviceName: {{ include "connito.object" (list . "nats-headless") }}
  podManagementPolicy: Parallel
  selector:
    matchLabels:
      {{- include "connito.selector" . | nindent 6 }}
      connito-workload: nats
  template:
    metadata:
      {{- include "connito.podMetadata" (list . "nats" $conf "nats") | nindent 6 }}
      {{- if not $conf.podAnnotations }}
      annotations:
      {{- end }}
        connito/config: {{ include "connito.natsConfig" . | sha256sum }}
    spec:
      {{- include "connito.placement" (list . "nats" (merge (dict "topologySpreadConstraints" list) $conf)) | nindent 6 }}
      terminationGracePeriodSeconds: {{ $conf.terminationGracePeriodSeconds | default 60 }}
      {{- $image := printf "%s:%s" $conf.image.repository $conf.image.tag }}
      {{- with $conf.image.digest }}{{ $image = printf "%s@%s" $conf.image.repository . }}{{ end }}
      {{- if $nats.tlsSecret }}
      shareProcessNamespace: true  # For whoever tells the server that its certificate was renewed.
      {{- end }}
      topologySpreadConstraints:
        {{- if $conf.topologySpreadConstraints }}
        {{- toYaml $conf.topologySpreadConstraints | nindent 8 }}
        {{- else }}
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: DoNotSchedule
          labelSelector:
            matchLabels:
              {{- include "connito.selector" . | nindent 14 }}
              connito-workload: nats
        {{- end }}
      containers:
        - name: nats
          image: {{ $image | quote }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          args: [--config, /etc/nats/nats.conf, --name, "$(POD_NAME)"]
          securityContext: {{- include "connito.containerSecurity" . | nindent 12 }}
          env:
            - name: POD_NAME
              valueFrom: { fieldRef: { fieldPath: metadata.name } }
            {{- include "connito.moreEnv" $conf | nindent 12 }}
          {{- with $conf.envFrom }}
          envFrom: {{- toYaml . | nindent 12 }}
          {{- end }}
          ports:
            - { name: nats, containerPort: 4222 }
            - { name: cluster, containerPort: 6222 }
            - { name: monitor, containerPort: 8222 }
          # A server that catches up is alive; one that is not in its group is not ready.
          startupProbe:
            httpGet: { path: "/healthz?js-enabled-only=true", port: monitor }
            periodSeconds: 2
            failureThreshold: 150
          livenessProbe:
            httpGet: { path: "/healthz?js-enabled-only=true", port: monitor }
            periodSeconds: 30
            timeoutSeconds: 5
          readinessProbe:
            httpGet: { path: "/healthz?js-server-only=true", port: monitor }
            periodSeconds: 10
            timeoutSeconds: 5
          # Hands its clients and leaderships to the others before it ends.
          lifecycle:
            preStop: { exec: { command: [nats-server, "-sl=ldm=/var/run/nats/nats.pid"] } }
          resources: {{- toYaml $conf.resources | nindent 12 }}
          volumeMounts:
            - { name: config, mountPath: /etc/nats, readOnly: true }
            - { name: run, mountPath: /var/run/nats }
            - { name: data, mountPath: /data }
            {{- if $nats.tlsSecret }}
            - { name: tls, mountPath: /etc/nats-tls, readOnly: true }
            {{- end }}
            {{- with $conf.extraVolumeMounts }}{{ toYaml . | nindent 12 }}{{ end }}
        {{- if $nats.exporter.enabled }}
        - name: exporter
          image: {{ $nats.exporter.image | quote }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          args: ["-port=7777", "-varz", "-jsz=all", "-healthz", "-routez", "http://127.0.0.1:8222/"]
          securityContext: {{- include "connito.containerSecurity" . | nindent 12 }}
          ports:
            - { name: metrics, containerPort: 7777 }
          resources: {{- toYaml $nats.exporter.resources | nindent 12 }}
        {{- end }}
        {{- if $nats.tlsSecret }}
        # nats-server reads its certificate when it is told to. It keeps its clients then, and shows new ones the new one.
        - name: reload
          image: {{ $image | quote }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          command: [sh, -c]
          args:
            - |
              hash() { cat /etc/nats-tls/tls.crt /etc/nats-tls/tls.key /etc/nats-tls/ca.crt | sha256sum; }
              seen=$(hash)
              while sleep 10; do
                now=$(hash)
                [ "$now" = "$seen" ] || { nats-server -sl=reload=/var/run/nats/nats.pid && seen=$now; }
              done
          securityContext: {{- include "connito.containerSecurity" . | nindent 12 }}
          resources:
            requests: { cpu: 5m, memory: 16Mi }
            limits: { memory: 64Mi }
          volumeMounts:
            - { name: run, mountPath: /var/run/nats }
            - { name: tls, mountPath: /etc/nats-tls, readOnly: true }
        {{- end }}
        {{- with $conf.extraContainers }}{{ toYaml . | nindent 8 }}{{ end }}
      volumes:
        - name: config
          configMap: { name: {{ include "connito.object" (list . "nats") }} }
        - name: run
          emptyDir: { sizeLimit: 16Mi }
        {{- with $nats.tlsSecret }}
        - name: tls
          secret: { secretName: {{ . | quote }}, defaultMode: 0440 }
        {{- end }}
        {{- with $conf.extraVolumes }}{{ toYaml . | nindent 8 }}{{ end }}
  volumeClaimTemplates:
    - metadata: { name: data }
      spec: {{- include "connito.claim" $nats.storage | nindent 8 }}
{{- if .Values.podDisruptionBudget.enabled }}
---
# Two of three servers are a quorum.
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {{- include "connito.metadata" (list . "nats" "nats") | nindent 2 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels:
      {{- include "connito.selector" . | nindent 6 }}
      connito-workload: nats
{{- end }}
{{- end }}
{{- end -}}
