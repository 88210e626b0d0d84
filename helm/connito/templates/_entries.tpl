{{/* Ways in from outside: an Ingress, or a route of the Gateway API. */}}
{{- define "connito.objects.entries" -}}
{{- $root := . -}}
{{- range (include "connito.components" . | fromJson).items }}
{{- $item := . }}
{{- $port := ternary 80 9090 .page }}
{{- with .conf.ingress }}
{{- if .enabled }}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  {{- include "connito.metadata" (list $root $item.name $item.component) | nindent 2 }}
  {{- with .annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with .className }}
  ingressClassName: {{ . }}
  {{- end }}
  {{- if .tlsSecret }}
  tls: [{ secretName: {{ .tlsSecret | quote }}, hosts: {{ toJson .hosts }} }]
  {{- end }}
  rules:
    {{- range required (printf "%s.ingress.hosts is empty: name the host that it answers to" $item.component) .hosts }}
    - host: {{ . | quote }}
      http:
        paths:
          - path: {{ $item.conf.ingress.path | default "/" | quote }}
            pathType: Prefix
            backend: { service: { name: {{ include "connito.object" (list $root $item.name) }}, port: { number: {{ $port }} } } }
    {{- end }}
{{- end }}
{{- end }}
{{- with .conf.route }}
{{- if .enabled }}
---
apiVersion: gateway.networking.k8s.io/v1
kind: {{ ternary "HTTPRoute" "GRPCRoute" $item.page }}
metadata:
  {{- include "connito.metadata" (list $root $item.name $item.component) | nindent 2 }}
  {{- with .annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  parentRefs: {{- toYaml (required (printf "%s.route.parentRefs is empty: name the Gateway" $item.component) .parentRefs) | nindent 4 }}
  {{- with .hostnames }}
  hostnames: {{- toYaml . | nindent 4 }}
  {{- end }}
  rules:
    - backendRefs: [{ name: {{ include "connito.object" (list $root $item.name) }}, port: {{ $port }} }]
{{- end }}
{{- end }}
{{- end }}
{{- end -}}
