{{/* A merge patch (RFC 7386) on a dict, in place: (list target patch) */}}
{{- define "connito.merge" -}}
{{- $target := index . 0 -}}
{{- range $key, $value := index . 1 -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $target $key -}}
{{- else if kindIs "map" $value -}}
{{- if not (kindIs "map" (get $target $key)) -}}
{{- $_ := set $target $key dict -}}
{{- end -}}
{{- include "connito.merge" (list (get $target $key) $value) -}}
{{- else -}}
{{- $_ := set $target $key $value -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Fill (list target more) with what target does not say already, in place. */}}
{{- define "connito.fill" -}}
{{- $target := index . 0 -}}
{{- range $key, $value := index . 1 -}}
{{- if not (hasKey $target $key) -}}{{- $_ := set $target $key $value -}}{{- end -}}
{{- end -}}
{{- end -}}

{{/* Everything the chart makes: common labels, patches, and for a Job a name that says what is in it. (list root names) */}}
{{- define "connito.emit" -}}
{{- $root := index . 0 -}}
{{- $fitted := dict -}}
{{- $full := include "connito.fullname" $root -}}
{{- range $name := index . 1 -}}
{{- range $text := regexSplit "(^|\n)---\n" (include (printf "connito.objects.%s" $name) $root) -1 -}}
{{- if trim $text -}}
{{- $object := fromYaml $text -}}
{{- if hasKey $object "Error" -}}{{- fail (printf "%s: %s in\n%s" $name $object.Error $text) -}}{{- end -}}
{{- with $root.Values.commonLabels -}}
{{- include "connito.fill" (list $object.metadata.labels .) -}}
{{- if hasKey ($object.spec | default dict) "template" -}}
{{- include "connito.fill" (list $object.spec.template.metadata.labels .) -}}
{{- end -}}
{{- end -}}
{{- with $root.Values.commonAnnotations -}}
{{- $_ := set $object.metadata "annotations" ($object.metadata.annotations | default dict) -}}
{{- include "connito.fill" (list $object.metadata.annotations .) -}}
{{- end -}}
{{- range $index, $patch := $root.Values.patches -}}
{{- $suffix := trimPrefix (printf "%s-" $full) $object.metadata.name -}}
{{- if and (eq $patch.kind $object.kind) (or (not $patch.name) (has $patch.name (list $suffix $object.metadata.name))) -}}
{{- include "connito.merge" (list $object $patch.merge) -}}
{{- $_ := set $fitted (toString $index) true -}}
{{- end -}}
{{- end -}}
{{- if eq $object.kind "Job" }}
{{- /* Jobs cannot be changed: whatever changes in one makes another one. */}}
{{- $_ := set $object.metadata "name" (printf "%s-%s" $object.metadata.name (toJson $object.spec | sha256sum | trunc 8)) }}
{{- end }}
---
{{ toYaml $object }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $index, $patch := $root.Values.patches -}}
{{- if not (hasKey $fitted (toString $index)) -}}
{{- fail (printf "patches[%d] fits nothing: there is no %s %s" $index $patch.kind ($patch.name | default "")) -}}
{{- end -}}
{{- end -}}
{{- range $root.Values.extraObjects }}
---
{{- $text := ternary (tpl (toString .) $root) (toYaml .) (kindIs "string" .) }}
{{- if not (regexMatch "(?m)^kind:" $text) }}{{ fail (printf "extraObjects: %q is no object, which has a kind" (trunc 60 $text)) }}{{ end }}
{{ $text }}
{{- end -}}
{{- end -}}
