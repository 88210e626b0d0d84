{{/*
Every workload of the release, as JSON {"items": [...]}. One entry is
  name       suffix of the object names           component  label and service, `python -m services.<component>`
  image      image name after `connito-`          secret     Secret with the nkey seed
  conf       the component's values               instance   the entry of `instances`, or empty
  api        serves gRPC                          stateful   one pod with a key of its own and a cache that stays
  page       serves the web page
*/}}
{{- define "connito.components" -}}
{{- $items := list -}}
{{- $platform := eq .Values.mode "platform" -}}
{{- range $component := list "coordinator" "committer" "library" "selector" "aggregator" "console" -}}
{{- $conf := index $.Values $component -}}
{{- if and $platform $conf.enabled -}}
{{- $secret := required (printf "%s.existingSecret is empty: name the Secret that holds the %s's key under %q" $component $component $.Values.keyName) $conf.existingSecret -}}
{{- $conf = mergeOverwrite (deepCopy $.Values.pods) (deepCopy $conf) -}}
{{- $image := include "connito.variant" (list $component $component $conf) -}}
{{- $items = append $items (dict "name" $component "component" $component "image" $image "secret" $secret "conf" $conf "instance" dict "api" (and (hasKey $conf "service") (ne $component "console")) "page" (eq $component "console") "stateful" false) -}}
{{- end -}}
{{- end -}}
{{- $secrets := dict -}}
{{- $names := dict -}}
{{- range $component := list "validator" "trainer" -}}
{{- $conf := index $.Values $component -}}
{{- if and $conf.enabled (or $platform (eq $component "trainer")) -}}
{{- range $conf.instances -}}
{{- $mine := printf "%s %s" $component .name -}}
{{- if hasKey $names $mine -}}
{{- fail (printf "%s.instances: two are called %s, and their objects would be" $component .name) -}}
{{- end -}}
{{- $_ := set $names $mine true -}}
{{- if hasKey $secrets .existingSecret -}}
{{- fail (printf "%s.instances: %s and %s have the Secret %s both: one key runs once" $component (get $secrets .existingSecret) .name .existingSecret) -}}
{{- end -}}
{{- $_ := set $secrets .existingSecret .name -}}
{{- $own := mergeOverwrite (deepCopy $.Values.pods) (omit (deepCopy $conf) "instances") (omit (deepCopy .) "name" "existingSecret" "run" "existingClaims") -}}
{{- $image := include "connito.variant" (list (printf "%s.instances: %s" $component .name) $component $own) -}}
{{- $items = append $items (dict "name" (printf "%s-%s" $component .name) "component" $component "image" $image "secret" .existingSecret "conf" $own "instance" . "api" false "page" false "stateful" true) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not $items -}}
{{- fail "nothing would be installed: with mode=trainer, name at least one entry in trainer.instances" -}}
{{- end -}}
{{- dict "items" $items | toJson -}}
{{- end -}}
