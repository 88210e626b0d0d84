{{- define "connito.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "connito.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "connito.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "connito.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects every pod of this release, and nothing of the NATS chart. */}}
{{- define "connito.selector" -}}
app.kubernetes.io/name: {{ include "connito.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "connito.labels" -}}
{{ include "connito.selector" . }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: connito
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* (list root image-name) */}}
{{- define "connito.image" -}}
{{- $root := index . 0 -}}
{{- $registry := required "image.registry is empty: name the registry and path that the images were pushed to, such as registry.example.com/connito" $root.Values.image.registry -}}
{{- printf "%s/connito-%s:%s" (trimSuffix "/" $registry) (index . 1) ($root.Values.image.tag | default $root.Chart.AppVersion) -}}
{{- end -}}

{{/* The official chart's own naming rule. */}}
{{- define "connito.natsFullname" -}}
{{- $own := .Values.nats.fullnameOverride | default "" -}}
{{- $name := .Values.nats.nameOverride | default "nats" -}}
{{- if $own -}}{{ $own }}
{{- else if contains $name .Release.Name -}}{{ .Release.Name }}
{{- else -}}{{ printf "%s-%s" .Release.Name $name }}
{{- end -}}
{{- end -}}

{{- define "connito.busUrl" -}}
{{- if .Values.bus.url -}}
{{- .Values.bus.url -}}
{{- else if and .Values.nats.enabled (eq .Values.mode "platform") -}}
{{- printf "nats://%s.%s.svc:4222" (include "connito.natsFullname" .) .Release.Namespace -}}
{{- else -}}
{{- fail "bus.url is empty: name the NATS address, such as nats://nats.messaging.svc:4222, or set nats.enabled=true to install NATS with this release" -}}
{{- end -}}
{{- end -}}

{{- define "connito.monitoringEndpoint" -}}
{{- if .Values.bus.monitoringEndpoint -}}
{{- .Values.bus.monitoringEndpoint -}}
{{- else if .Values.nats.enabled -}}
{{- printf "%s-headless.%s.svc:8222" (include "connito.natsFullname" .) .Release.Namespace -}}
{{- else -}}
{{- fail "bus.monitoringEndpoint is empty: KEDA reads consumer lag from NATS's monitoring port; name it as host:8222, or set keda.enabled=false" -}}
{{- end -}}
{{- end -}}

{{/* Ports of a list of URLs, JSON; (dict "urls" list "default" port) */}}
{{- define "connito.ports" -}}
{{- $ports := list -}}
{{- $default := .default -}}
{{- range .urls -}}
{{- $url := urlParse (trim .) -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- if not $port -}}{{- $port = ternary "443" (ternary "80" (toString $default) (eq $url.scheme "http")) (eq $url.scheme "https") -}}{{- end -}}
{{- $ports = append $ports (int $port) -}}
{{- end -}}
{{- dict "ports" ($ports | uniq) | toJson -}}
{{- end -}}
