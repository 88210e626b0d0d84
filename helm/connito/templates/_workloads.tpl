{{- define "connito.objects.workloads" -}}
{{- $root := . -}}
{{- range $item := (include "connito.components" . | fromJson).items }}
{{- if .stateful }}
---
# A StatefulSet, because two pods with one key must never run at once. With the rollout Job, which restarts one after
# the other, the controller itself restarts none.
apiVersion: apps/v1
kind: StatefulSet
metadata: {{- include "connito.metadata" (list $root .name .component) | nindent 2 }}
spec:
  replicas: {{ ternary 0 1 $root.Values.stopped }}
  serviceName: {{ include "connito.object" (list $root .name) }}
  updateStrategy: { type: {{ ternary "OnDelete" "RollingUpdate" $root.Values.rollout.enabled }} }
  selector:
    matchLabels:
      {{- include "connito.selector" $root | nindent 6 }}
      connito-workload: {{ .name }}
  template: {{- include "connito.pod" (dict "root" $root "item" .) | nindent 4 }}
{{- range $use := list "cache" "work" }}
{{- with get $item.conf $use }}
{{- if not (get ($item.instance.existingClaims | default dict) $use) }}
---
# Not a template of the StatefulSet's: those can never change, a claim may grow. What a miner works on outlives the release.
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ include "connito.claimName" (list $root $item $use) }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "connito.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $item.component }}
  {{- if eq $use "work" }}
  annotations: { helm.sh/resource-policy: keep }
  {{- end }}
spec: {{- include "connito.claim" . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}
{{- else }}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{- include "connito.metadata" (list $root .name .component) | nindent 2 }}
spec:
  {{- if or $root.Values.stopped (not (or (and $root.Values.keda.enabled .conf.autoscaling) (.conf.hpa).enabled)) }}
  replicas: {{ ternary 0 .conf.replicas $root.Values.stopped }}
  {{- end }}
  selector:
    matchLabels:
      {{- include "connito.selector" $root | nindent 6 }}
      connito-workload: {{ .name }}
  strategy:
    type: RollingUpdate
    # A GPU for the new pod may not be there before the old one gives its own back.
    rollingUpdate: {{ ternary "{ maxSurge: 0, maxUnavailable: 1 }" "{ maxSurge: 1, maxUnavailable: 0 }" (eq (.conf.variant | default "cpu") "cuda") }}
  template: {{- include "connito.pod" (dict "root" $root "item" .) | nindent 4 }}
{{- end }}
{{- end }}
{{- end -}}
