{{/* Where alerts are explained: where it is said, else at the console, if its address is known. */}}
{{- define "connito.runbooks" -}}
{{- $console := .Values.console -}}
{{- $page := "" -}}
{{- if $console.enabled -}}
{{- $ingress := $console.ingress | default dict -}}
{{- $route := $console.route | default dict -}}
{{- if and $console.oidc.client $console.oidc.url -}}
{{- $page = trimSuffix "/" $console.oidc.url -}}
{{- else if and $ingress.enabled $ingress.hosts (eq (trimSuffix "/" ($ingress.path | default "")) "") -}}
{{- $page = printf "%s://%s" (ternary "https" "http" (not (empty $ingress.tlsSecret))) (first $ingress.hosts) -}}
{{- else if and $route.enabled $route.hostnames -}}
{{- $page = printf "https://%s" (first $route.hostnames) -}}
{{- end -}}
{{- end -}}
{{- .Values.monitoring.prometheusRule.runbooks | default (ternary (printf "%s/static/alerts.html" $page) "" (ne $page "")) -}}
{{- end -}}

{{- define "connito.objects.monitoring" -}}
{{- if .Values.monitoring.serviceMonitor.enabled }}
---
apiVersion: monitoring.coreos.com/v1
kind: ServiceMonitor
metadata:
  name: {{ include "connito.fullname" . }}
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "connito.labels" . | nindent 4 }}
    {{- with .Values.monitoring.serviceMonitor.labels }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  selector:
    matchLabels: {{- include "connito.selector" . | nindent 6 }}
  namespaceSelector: { matchNames: [{{ .Release.Namespace }}] }
  endpoints:
    - port: http
      path: /metrics
      interval: {{ .Values.monitoring.serviceMonitor.interval }}
      relabelings:
        - { sourceLabels: [__meta_kubernetes_service_label_app_kubernetes_io_component], targetLabel: component }
        - { sourceLabels: [__meta_kubernetes_service_label_app_kubernetes_io_instance], targetLabel: release }
{{- end }}
{{- if .Values.monitoring.podMonitor.enabled }}
---
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
metadata:
  name: {{ include "connito.fullname" . }}
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "connito.labels" . | nindent 4 }}
    {{- with .Values.monitoring.podMonitor.labels }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  selector:
    matchLabels: {{- include "connito.selector" . | nindent 6 }}
  namespaceSelector: { matchNames: [{{ .Release.Namespace }}] }
  podMetricsEndpoints:
    {{- range $port := list "http" "metrics" }}
    - port: {{ $port }}
      path: /metrics
      interval: {{ $.Values.monitoring.podMonitor.interval }}
      relabelings:
        - { sourceLabels: [__meta_kubernetes_pod_label_app_kubernetes_io_component], targetLabel: component }
        - { sourceLabels: [__meta_kubernetes_pod_label_app_kubernetes_io_instance], targetLabel: release }
    {{- end }}
{{- end }}
{{- if .Values.monitoring.prometheusRule.enabled }}
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: {{ include "connito.fullname" . }}
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "connito.labels" . | nindent 4 }}
    {{- with .Values.monitoring.prometheusRule.labels }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  groups:
    {{- $platform := eq .Values.mode "platform" }}
    {{- $runbooks := include "connito.runbooks" . }}
    {{- range (.Files.Get "files/rules.yaml" | fromYaml).groups }}
    {{- if or $platform (eq .name "connito.everywhere") }}
    {{- range $rule := .rules }}
    {{- if and $rule.alert $runbooks }}{{- $_ := set $rule.annotations "runbook_url" (printf "%s#%s" $runbooks (lower $rule.alert)) }}{{ end }}
    {{- end }}
    - {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- end }}
{{- end }}
{{- if .Values.monitoring.dashboards.enabled }}
{{- $root := . }}
{{- range $path, $content := .Files.Glob "files/dashboards/*.json" }}
{{- $name := base $path | trimSuffix ".json" }}
{{- if or (eq $root.Values.mode "platform") (eq $name "miner") }}
---
apiVersion: v1
kind: ConfigMap
metadata:
  {{- include "connito.metadata" (list $root (printf "dashboard-%s" $name) "") | nindent 2 }}
    {{- with $root.Values.monitoring.dashboards.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $root.Values.monitoring.dashboards.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
data:
  connito-{{ $name }}.json: |
    {{- $content | toString | trim | nindent 4 }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}
