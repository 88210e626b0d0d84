{{- define "connito.objects.roundtrip" -}}
{{- if and .Values.tests.enabled (eq .Values.mode "platform") }}
{{- $secret := required "streams.existingSecret is empty: `helm test` uses the operator's key" .Values.streams.existingSecret }}
{{- $conf := mergeOverwrite (deepCopy .Values.pods) (deepCopy (pick .Values.streams "resources")) (deepCopy .Values.tests) }}
---
apiVersion: v1
kind: ConfigMap
metadata:
  {{- include "connito.metadata" (list . "test" "test") | nindent 2 }}
  annotations:
    helm.sh/hook: test
    helm.sh/hook-weight: "-1"
    helm.sh/hook-delete-policy: before-hook-creation
data:
  roundtrip.py: |
    {{- .Files.Get "files/roundtrip.py" | trim | nindent 4 }}
---
# `helm test`: an object goes to the store, an event about it over the bus, and both come back unchanged.
apiVersion: v1
kind: Pod
metadata:
  name: {{ include "connito.object" (list . "test-roundtrip") }}
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "connito.labels" . | nindent 4 }}
    app.kubernetes.io/component: test
    {{- with $conf.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  annotations:
    helm.sh/hook: test
    helm.sh/hook-delete-policy: before-hook-creation
    {{- with $conf.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  {{- include "connito.placement" (list . "tests" $conf) | nindent 2 }}
  restartPolicy: Never
  containers:
    - name: roundtrip
      image: {{ include "connito.image" (list . "tools" $conf.image) | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [python3, /etc/connito/test/roundtrip.py]
      securityContext: {{- include "connito.containerSecurity" . | nindent 8 }}
      env:
        {{- include "connito.commonEnv" (dict "root" .) | nindent 8 }}
        {{- include "connito.storeEnv" (list . "roundtrip") | nindent 8 }}
        {{- include "connito.moreEnv" $conf | nindent 8 }}
      {{- with $conf.envFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      resources: {{- toYaml $conf.resources | nindent 8 }}
      volumeMounts:
        {{- include "connito.commonMounts" (dict "root" . "store" true) | nindent 8 }}
        - { name: test, mountPath: /etc/connito/test, readOnly: true }
        {{- with $conf.extraVolumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
    {{- with $conf.extraContainers }}{{ toYaml . | nindent 4 }}{{ end }}
  volumes:
    {{- include "connito.commonVolumes" (dict "root" . "secret" $secret "store" true) | nindent 4 }}
    - name: test
      configMap: { name: {{ include "connito.object" (list . "test") }} }
    {{- with $conf.extraVolumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end }}
{{- end -}}
