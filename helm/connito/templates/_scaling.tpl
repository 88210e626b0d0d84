{{- define "connito.objects.scaling" -}}
{{- $root := . -}}
{{- range (include "connito.components" . | fromJson).items }}
{{- $hpa := .conf.hpa | default dict }}
{{- if and $hpa.enabled $root.Values.keda.enabled .conf.autoscaling }}
{{- fail (printf "%s would be scaled by KEDA and by its hpa: switch one of them off" .component) }}
{{- end }}
{{- if $hpa.enabled }}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {{- include "connito.metadata" (list $root .name .component) | nindent 2 }}
spec:
  scaleTargetRef: { apiVersion: apps/v1, kind: Deployment, name: {{ include "connito.object" (list $root .name) }} }
  minReplicas: {{ $hpa.minReplicas | default 1 }}
  maxReplicas: {{ $hpa.maxReplicas | default 4 }}
  metrics:
    - { type: Resource, resource: { name: cpu, target: { type: Utilization, averageUtilization: {{ $hpa.cpu | default 80 }} } } }
  {{- with $hpa.behavior }}
  behavior: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- else if and $root.Values.keda.enabled .conf.autoscaling }}
---
# Scales on the messages that wait in the component's durable consumer, not on CPU.
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata: {{- include "connito.metadata" (list $root .name .component) | nindent 2 }}
spec:
  scaleTargetRef: { apiVersion: apps/v1, kind: Deployment, name: {{ include "connito.object" (list $root .name) }} }
  pollingInterval: {{ $root.Values.keda.pollingInterval }}
  cooldownPeriod: {{ $root.Values.keda.cooldownPeriod }}
  minReplicaCount: {{ .conf.autoscaling.minReplicas }}
  maxReplicaCount: {{ .conf.autoscaling.maxReplicas }}
  triggers:
    - type: nats-jetstream
      metadata:
        natsServerMonitoringEndpoint: {{ include "connito.monitoringEndpoint" $root | quote }}
        account: {{ required "keda.account is empty: name the account whose streams are watched, as nats-values.yaml of `connito access export` does, or set keda.enabled=false" $root.Values.keda.account | quote }}
        stream: RUNS
        consumer: {{ .component | quote }}
        lagThreshold: {{ .conf.autoscaling.lagThreshold | toString | quote }}
{{- end }}
{{- end }}
{{- end -}}
