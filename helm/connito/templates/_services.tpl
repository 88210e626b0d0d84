{{/* What a Service that may be reached from outside says beyond its ports. */}}
{{- define "connito.exposure" -}}
type: {{ .type }}
{{- if ne .type "ClusterIP" }}
{{- with .loadBalancerSourceRanges }}
loadBalancerSourceRanges: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .loadBalancerClass }}
loadBalancerClass: {{ . | quote }}
{{- end }}
{{- with .externalTrafficPolicy }}
externalTrafficPolicy: {{ . }}
{{- end }}
{{- end }}
{{- with .ipFamilyPolicy }}
ipFamilyPolicy: {{ . }}
{{- end }}
{{- with .ipFamilies }}
ipFamilies: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "connito.nodePort" -}}
{{- if and (ne .type "ClusterIP") .nodePort }}, nodePort: {{ .nodePort }}{{ end -}}
{{- end -}}

{{- define "connito.objects.services" -}}
{{- $root := . -}}
{{- range (include "connito.components" . | fromJson).items }}
{{- $service := .conf.service | default dict }}
---
apiVersion: v1
kind: Service
metadata:
  {{- include "connito.metadata" (list $root .name .component) | nindent 2 }}
    connito-workload: {{ .name }}
    {{- with $service.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $service.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if or .api .page }}
  {{- include "connito.exposure" $service | nindent 2 }}
  {{- else }}
  clusterIP: None
  {{- end }}
  selector:
    {{- include "connito.selector" $root | nindent 4 }}
    connito-workload: {{ .name }}
  ports:
    {{- if .api }}
    - { name: grpc, port: 9090, targetPort: grpc, appProtocol: kubernetes.io/h2c{{ include "connito.nodePort" $service }} }
    {{- end }}
    {{- if .page }}
    - { name: page, port: 80, targetPort: page, appProtocol: http{{ include "connito.nodePort" $service }} }
    {{- end }}
    {{- if or (not (or .api .page)) (eq $service.type "ClusterIP") }}
    - { name: http, port: 8080, targetPort: http }
    {{- end }}
{{- if and (or .api .page) (ne $service.type "ClusterIP") }}
---
# The API's Service is reachable from outside; metrics and health stay inside.
apiVersion: v1
kind: Service
metadata:
  {{- include "connito.metadata" (list $root (printf "%s-http" .name) .component) | nindent 2 }}
    connito-workload: {{ .name }}
spec:
  clusterIP: None
  selector:
    {{- include "connito.selector" $root | nindent 4 }}
    connito-workload: {{ .name }}
  ports:
    - { name: http, port: 8080, targetPort: http }
{{- end }}
{{- end }}
{{- end -}}
