{{- define "connito.objects.rollout" -}}
{{- $root := . -}}
{{- $templates := list -}}
{{- range (include "connito.components" . | fromJson).items -}}
{{- if .stateful -}}{{- $templates = append $templates (include "connito.pod" (dict "root" $root "item" .)) -}}{{- end -}}
{{- end -}}
{{- if and .Values.rollout.enabled $templates }}
{{- $conf := mergeOverwrite (deepCopy .Values.pods) (deepCopy .Values.rollout) }}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "connito.metadata" (list . "rollout" "rollout") | nindent 2 }}
  {{- with ($conf.serviceAccount).annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{- include "connito.metadata" (list . "rollout" "rollout") | nindent 2 }}
rules:
  - { apiGroups: [apps], resources: [statefulsets], verbs: [get, list] }
  - { apiGroups: [""], resources: [pods], verbs: [get, list] }
  - { apiGroups: [""], resources: [pods/eviction], verbs: [create] }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{- include "connito.metadata" (list . "rollout" "rollout") | nindent 2 }}
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: Role, name: {{ include "connito.object" (list . "rollout") }} }
subjects:
  - { kind: ServiceAccount, name: {{ include "connito.object" (list . "rollout") }}, namespace: {{ .Release.Namespace }} }
---
apiVersion: v1
kind: ConfigMap
metadata: {{- include "connito.metadata" (list . "rollout" "rollout") | nindent 2 }}
data:
  rollout.py: |
    {{- .Files.Get "files/rollout.py" | trim | nindent 4 }}
---
# Runs when a StatefulSet's pods are to be other ones, and replaces them one after the other.
apiVersion: batch/v1
kind: Job
metadata: {{- include "connito.metadata" (list . "rollout" "rollout") | nindent 2 }}
spec:
  backoffLimit: 20
  {{- with $conf.ttlSecondsAfterFinished }}
  ttlSecondsAfterFinished: {{ . }}
  {{- end }}
  template:
    metadata:
      {{- include "connito.podMetadata" (list . "rollout" $conf "") | nindent 6 }}
    spec:
      {{- include "connito.placement" (list . "rollout" (merge (dict "serviceAccount" (dict "name" (include "connito.object" (list . "rollout")))) $conf)) | nindent 6 }}
      restartPolicy: OnFailure
      containers:
        - name: rollout
          image: {{ include "connito.image" (list . "tools" $conf.image) | quote }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          command: [python3, /etc/connito/rollout/rollout.py]
          securityContext: {{- include "connito.containerSecurity" . | nindent 12 }}
          env:
            - { name: SELECTOR, value: {{ printf "app.kubernetes.io/name=%s,app.kubernetes.io/instance=%s" .Chart.Name .Release.Name | quote }} }
            - { name: TIMEOUT_SECONDS, value: {{ .Values.rollout.timeoutSeconds | quote }} }
            # What this Job is for; other templates make another Job.
            - { name: TEMPLATES, value: {{ toJson $templates | sha256sum | quote }} }
            {{- include "connito.moreEnv" $conf | nindent 12 }}
          {{- with $conf.envFrom }}
          envFrom: {{- toYaml . | nindent 12 }}
          {{- end }}
          resources: {{- toYaml $conf.resources | nindent 12 }}
          volumeMounts:
            - { name: script, mountPath: /etc/connito/rollout, readOnly: true }
            - { name: api, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true }
            - { name: tmp, mountPath: /tmp }
            {{- with $conf.extraVolumeMounts }}{{ toYaml . | nindent 12 }}{{ end }}
        {{- with $conf.extraContainers }}{{ toYaml . | nindent 8 }}{{ end }}
      volumes:
        - name: script
          configMap: { name: {{ include "connito.object" (list . "rollout") }} }
        - name: tmp
          emptyDir: { sizeLimit: 16Mi }
        - name: api
          projected:
            defaultMode: 0440
            sources:
              - serviceAccountToken: { path: token, expirationSeconds: 3600 }
              - configMap: { name: kube-root-ca.crt, items: [{ key: ca.crt, path: ca.crt }] }
              - downwardAPI: { items: [{ path: namespace, fieldRef: { fieldPath: metadata.namespace } }] }
        {{- with $conf.extraVolumes }}{{ toYaml . | nindent 8 }}{{ end }}
{{- end }}
{{- end -}}
