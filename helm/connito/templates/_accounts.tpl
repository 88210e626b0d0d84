{{/* ServiceAccount of a pod: (list root component conf) */}}
{{- define "connito.account" -}}
{{- $root := index . 0 -}}
{{- $own := (index . 2).serviceAccount | default dict -}}
{{- if $own.name -}}{{ $own.name }}
{{- else if $own.annotations -}}{{ include "connito.object" (list $root (index . 1)) }}
{{- else -}}{{ $root.Values.serviceAccount.name | default (include "connito.fullname" $root) }}
{{- end -}}
{{- end -}}

{{- define "connito.objects.accounts" -}}
{{- $root := . -}}
{{- if not .Values.serviceAccount.name }}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "connito.fullname" . }}
  namespace: {{ .Release.Namespace }}
  labels: {{- include "connito.labels" . | nindent 4 }}
  {{- with .Values.serviceAccount.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end }}
{{- range $name, $own := include "connito.ownAccounts" . | fromJson }}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "connito.object" (list $root $name) }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "connito.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $own.component }}
  annotations: {{- toYaml $own.annotations | nindent 4 }}
automountServiceAccountToken: false
{{- end }}
{{- end -}}

{{/* Name -> component and annotations of the accounts that components ask for, JSON. */}}
{{- define "connito.ownAccounts" -}}
{{- $result := dict -}}
{{- range (include "connito.components" . | fromJson).items -}}
{{- $own := .conf.serviceAccount | default dict -}}
{{- if and $own.annotations (not $own.name) -}}{{- $_ := set $result .name (dict "component" .component "annotations" $own.annotations) -}}{{- end -}}
{{- end -}}
{{- range $name := ternary (list "streams" "tests" "serve") (list "serve") (eq .Values.mode "platform") -}}
{{- $own := (index $.Values $name).serviceAccount | default dict -}}
{{- if and $own.annotations (not $own.name) -}}{{- $_ := set $result $name (dict "component" $name "annotations" $own.annotations) -}}{{- end -}}
{{- end -}}
{{- toJson $result -}}
{{- end -}}
