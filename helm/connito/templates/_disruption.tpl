{{/* A budget of a component's own, or the common one: (list root conf) */}}
{{- define "connito.budget" -}}
{{- $own := (index . 1).podDisruptionBudget | default dict -}}
{{- if hasKey $own "minAvailable" -}}
minAvailable: {{ $own.minAvailable }}
{{- else -}}
maxUnavailable: {{ hasKey $own "maxUnavailable" | ternary $own.maxUnavailable (index . 0).Values.podDisruptionBudget.maxUnavailable }}
{{- end }}
unhealthyPodEvictionPolicy: AlwaysAllow
{{- end -}}

{{- define "connito.objects.disruption" -}}
{{- $root := . -}}
{{- if .Values.podDisruptionBudget.enabled }}
{{- $together := dict }}
{{- range (include "connito.components" . | fromJson).items }}
{{- if .stateful }}
{{- $_ := set $together .component .conf }}
{{- else }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {{- include "connito.metadata" (list $root .name .component) | nindent 2 }}
spec:
  {{- include "connito.budget" (list $root .conf) | nindent 2 }}
  selector:
    matchLabels:
      {{- include "connito.selector" $root | nindent 6 }}
      connito-workload: {{ .name }}
{{- end }}
{{- end }}
{{- range $component, $conf := $together }}
---
# A drain may take one at a time, so that a quorum of validators keeps scoring and miners keep training.
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {{- include "connito.metadata" (list $root $component $component) | nindent 2 }}
spec:
  {{- include "connito.budget" (list $root $conf) | nindent 2 }}
  selector:
    matchLabels:
      {{- include "connito.selector" $root | nindent 6 }}
      app.kubernetes.io/component: {{ $component }}
{{- end }}
{{- end }}
{{- end -}}
