{{- define "connito.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* (list text limit): what is too long keeps a hash of the whole, so that two long names stay two. */}}
{{- define "connito.short" -}}
{{- $text := index . 0 -}}
{{- $limit := int (index . 1) -}}
{{- if le (len $text) $limit -}}
{{- $text -}}
{{- else -}}
{{- printf "%s-%s" (trunc (int (sub $limit 9)) $text | trimSuffix "-") (sha256sum $text | trunc 8) -}}
{{- end -}}
{{- end -}}

{{- define "connito.fullname" -}}
{{- $full := .Values.fullnameOverride -}}
{{- if not $full -}}
{{- $full = ternary .Release.Name (printf "%s-%s" .Release.Name (include "connito.name" .)) (contains (include "connito.name" .) .Release.Name) -}}
{{- end -}}
{{- include "connito.short" (list $full 40) -}}
{{- end -}}

{{/* (list root suffix). 52: Kubernetes makes a label of a StatefulSet's name and eleven more letters. */}}
{{- define "connito.object" -}}
{{- include "connito.short" (list (printf "%s-%s" (include "connito.fullname" (index . 0)) (index . 1)) 52) -}}
{{- end -}}

{{/* What selects every pod of this release. Never changes: selectors cannot. */}}
{{- define "connito.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "connito.labels" -}}
{{ include "connito.selector" . }}
app.kubernetes.io/version: {{ regexReplaceAll "[^A-Za-z0-9._-]" (.Values.image.tag | default .Chart.AppVersion) "_" | trunc 63 | trimAll "-_." | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: connito
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* metadata of an object: (list root suffix component) */}}
{{- define "connito.metadata" -}}
{{- $root := index . 0 -}}
name: {{ include "connito.object" (list $root (index . 1)) }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "connito.labels" $root | nindent 2 }}
  {{- with index . 2 }}
  app.kubernetes.io/component: {{ . }}
  {{- end }}
{{- end -}}

{{/* (list where image-name its-values): the image with CUDA where they say so, and ask for a GPU. */}}
{{- define "connito.variant" -}}
{{- $conf := index . 2 -}}
{{- if ne ($conf.variant | default "cpu") "cuda" -}}
{{- index . 1 -}}
{{- else -}}
{{- $resources := $conf.resources | default dict -}}
{{- if not (or $resources.claims (contains "/" (keys ($resources.limits | default dict) | join " "))) -}}
{{- fail (printf "%s.variant is cuda, and %s.resources.limits asks for no GPU: the pod would get none. Set nvidia.com/gpu: 1 there, or variant: cpu" (index . 0) (index . 0)) -}}
{{- end -}}
{{- printf "%s-cuda" (index . 1) -}}
{{- end -}}
{{- end -}}

{{/* (list root image-name component's-own) */}}
{{- define "connito.image" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $own := index . 2 | default dict -}}
{{- $repository := $own.repository -}}
{{- if not $repository -}}
{{- $registry := required "image.registry is empty: name the registry and path that the images were pushed to, such as registry.example.com/connito" $root.Values.image.registry -}}
{{- $repository = printf "%s/connito-%s" (trimSuffix "/" $registry) $name -}}
{{- end -}}
{{- $digest := $own.digest | default (get $root.Values.image.digests $name) -}}
{{- if $digest -}}
{{- printf "%s@%s" $repository $digest -}}
{{- else -}}
{{- printf "%s:%s" $repository ($own.tag | default $root.Values.image.tag | default $root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "connito.busUrl" -}}
{{- if .Values.bus.url -}}
{{- .Values.bus.url -}}
{{- else if and .Values.nats.enabled (eq .Values.mode "platform") -}}
{{- printf "%s://%s.%s.svc:4222" (ternary "tls" "nats" (not (empty .Values.nats.tlsSecret))) (include "connito.object" (list . "nats")) .Release.Namespace -}}
{{- else -}}
{{- fail "bus.url is empty: name the NATS address, such as nats://nats.messaging.svc:4222, or set nats.enabled=true to install NATS with this release" -}}
{{- end -}}
{{- end -}}

{{- define "connito.monitoringEndpoint" -}}
{{- if .Values.bus.monitoringEndpoint -}}
{{- .Values.bus.monitoringEndpoint -}}
{{- else if .Values.nats.enabled -}}
{{- printf "%s.%s.svc:8222" (include "connito.object" (list . "nats-headless")) .Release.Namespace -}}
{{- else -}}
{{- fail "bus.monitoringEndpoint is empty: KEDA reads consumer lag from NATS's monitoring port; name it as host:8222, or set keda.enabled=false" -}}
{{- end -}}
{{- end -}}

{{- define "connito.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (ternary (include "connito.object" (list . "tls")) "" .Values.tls.certManager.enabled) -}}
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
