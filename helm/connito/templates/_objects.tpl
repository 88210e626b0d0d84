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

{{/* Refuse a patch that makes another object of one, or one that no server takes: (list index object before) */}}
{{- define "connito.patched" -}}
{{- $where := printf "patches[%d] on %s %s" (index . 0) (index . 2).kind (index . 2).metadata.name -}}
{{- $object := index . 1 -}}
{{- $before := index . 2 -}}
{{- range $key := list "apiVersion" "kind" -}}
{{- if ne (toString (get $object $key)) (get $before $key) -}}{{- fail (printf "%s may not change %s" $where $key) -}}{{- end -}}
{{- end -}}
{{- range $key := list "metadata" "spec" "data" "rules" "roleRef" "subjects" -}}
{{- if and (hasKey $before $key) (ne (kindOf (get $object $key)) (kindOf (get $before $key))) -}}{{- fail (printf "%s takes %s away, which the object needs" $where $key) -}}{{- end -}}
{{- end -}}
{{- range $key := list "name" "namespace" -}}
{{- if ne (toString (get $object.metadata $key)) (toString (get $before.metadata $key)) -}}{{- fail (printf "%s may not change metadata.%s" $where $key) -}}{{- end -}}
{{- end -}}
{{- if and (kindIs "map" $before.spec) (hasKey $before.spec "selector") (not (deepEqual $before.spec.selector (get $object.spec "selector"))) -}}
{{- fail (printf "%s may not change spec.selector: pods would be nobody's, and no upgrade would be taken" $where) -}}
{{- end -}}
{{- range $key := list "labels" "annotations" -}}
{{- range $name, $value := (get $object.metadata $key | default dict) -}}
{{- if not (kindIs "string" $value) -}}{{- fail (printf "%s: metadata.%s.%s is %v and has to be a text: quote it" $where $key $name $value) -}}{{- end -}}
{{- end -}}
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
{{- $before := deepCopy $object -}}
{{- include "connito.merge" (list $object $patch.merge) -}}
{{- include "connito.patched" (list $index $object $before) -}}
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
{{- if not (or (hasKey $fitted (toString $index)) $root.Values.stopped) -}}
{{- fail (printf "patches[%d] fits nothing: there is no %s %s" $index $patch.kind ($patch.name | default "")) -}}
{{- end -}}
{{- end -}}
{{- range $root.Values.extraObjects }}
---
{{- $text := ternary (tpl (toString .) $root) (toYaml .) (kindIs "string" .) }}
{{- range $key := list "kind" "apiVersion" "metadata" }}
{{- if not (regexMatch (printf "(?m)^%s:" $key) $text) }}{{ fail (printf "extraObjects: %q is no object, which has %s" (trunc 60 $text) (ternary "a kind" $key (eq $key "kind"))) }}{{ end }}
{{- end }}
{{ $text }}
{{- end -}}
{{- end -}}
