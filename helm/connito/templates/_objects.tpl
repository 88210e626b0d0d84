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

{{/* A quantity as a number. */}}
{{- define "connito.amount" -}}
{{- if kindIs "string" . -}}
{{- $units := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[A-Za-z]*$" .) | default 1) -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}

{{/* Keep the last of variables with one name, and refuse what an API server would, in an object: (object) */}}
{{- define "connito.checked" -}}
{{- $where := printf "%s %s" .kind .metadata.name -}}
{{- $spec := .spec | default dict -}}
{{- $template := ternary (dict "spec" $spec) ($spec.template | default dict) (eq .kind "Pod") -}}
{{- if kindIs "map" $template.spec -}}
{{- range $name, $value := ($spec.selector | default dict).matchLabels -}}
{{- if ne (toString $value) (toString (get $template.metadata.labels $name)) -}}
{{- fail (printf "%s: the label %s of its pods has to stay %s, by which they are found" $where $name $value) -}}
{{- end -}}
{{- end -}}
{{- $volumes := list -}}
{{- range concat ($template.spec.volumes | default list) -}}{{- $volumes = append $volumes .name -}}{{- end -}}
{{- range $spec.volumeClaimTemplates -}}{{- $volumes = append $volumes .metadata.name -}}{{- end -}}
{{- $containers := list -}}
{{- range concat ($template.spec.initContainers | default list) $template.spec.containers -}}
{{- $containers = append $containers .name -}}
{{- $known := dict -}}
{{- $env := list -}}
{{- range reverse (.env | default list) -}}
{{- if not (hasKey $known .name) -}}{{- $env = prepend $env . -}}{{- $_ := set $known .name true -}}{{- end -}}
{{- end -}}
{{- if $env -}}{{- $_ := set . "env" $env -}}{{- end -}}
{{- $container := .name -}}
{{- $limits := (.resources | default dict).limits | default dict -}}
{{- range $what, $asked := (.resources | default dict).requests -}}
{{- if and (hasKey $limits $what) (gt (include "connito.amount" $asked | float64) (include "connito.amount" (get $limits $what) | float64)) -}}
{{- fail (printf "%s: %s has resources.requests.%s %v and may have no more than %v: lower the one or raise the other" $where $container $what $asked (get $limits $what)) -}}
{{- end -}}
{{- end -}}
{{- range .volumeMounts -}}
{{- if not (has .name $volumes) -}}{{- fail (printf "%s: %s mounts %s, and there is no such volume: add it to extraVolumes" $where $container .name) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- range $what, $names := dict "volumes" $volumes "containers" $containers -}}
{{- if ne (len $names) (len (uniq $names)) -}}{{- fail (printf "%s has two %s of one name: %s" $where $what (join ", " (sortAlpha $names))) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq .kind "HorizontalPodAutoscaler") (gt (int $spec.minReplicas) (int $spec.maxReplicas)) -}}
{{- fail (printf "%s: minReplicas is %v and maxReplicas %v" $where $spec.minReplicas $spec.maxReplicas) -}}
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
{{- include "connito.checked" $object -}}
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
