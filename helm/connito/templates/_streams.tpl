{{- define "connito.objects.streams" -}}
{{- if and .Values.streams.enabled (eq .Values.mode "platform") }}
{{- $secret := required "streams.existingSecret is empty: name the Secret with the operator's key, which may create streams" .Values.streams.existingSecret }}
{{- if and .Values.nats.enabled (gt (int .Values.bus.streamReplicas) (int .Values.nats.replicas)) }}
{{- fail (printf "bus.streamReplicas is %v and nats.replicas %v: a server keeps one copy of a stream" .Values.bus.streamReplicas .Values.nats.replicas) }}
{{- end }}
{{- $conf := mergeOverwrite (deepCopy .Values.pods) (deepCopy .Values.streams) }}
---
# An ordinary Job, not a hook: services wait for their streams, and hooks would wait for the services.
apiVersion: batch/v1
kind: Job
metadata: {{- include "connito.metadata" (list . "streams" "streams") | nindent 2 }}
spec:
  backoffLimit: 20
  {{- with $conf.ttlSecondsAfterFinished }}
  ttlSecondsAfterFinished: {{ . }}
  {{- end }}
  template:
    metadata: {{- include "connito.podMetadata" (list . "streams" $conf "") | nindent 6 }}
    spec:
      {{- include "connito.placement" (list . "streams" $conf) | nindent 6 }}
      restartPolicy: OnFailure
      containers:
        - name: streams
          image: {{ include "connito.image" (list . "tools" $conf.image) | quote }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          args: [streams, ensure, --replicas, {{ .Values.bus.streamReplicas | quote }}]
          securityContext: {{- include "connito.containerSecurity" . | nindent 12 }}
          env:
            {{- include "connito.commonEnv" (dict "root" .) | nindent 12 }}
            {{- include "connito.moreEnv" $conf | nindent 12 }}
          {{- with $conf.envFrom }}
          envFrom: {{- toYaml . | nindent 12 }}
          {{- end }}
          resources: {{- toYaml $conf.resources | nindent 12 }}
          volumeMounts:
            {{- include "connito.commonMounts" (dict "root" .) | nindent 12 }}
            {{- with $conf.extraVolumeMounts }}{{ toYaml . | nindent 12 }}{{ end }}
        {{- with $conf.extraContainers }}{{ toYaml . | nindent 8 }}{{ end }}
      volumes:
        {{- include "connito.commonVolumes" (dict "root" . "secret" $secret) | nindent 8 }}
        {{- with $conf.extraVolumes }}{{ toYaml . | nindent 8 }}{{ end }}
{{- end }}
{{- end -}}
