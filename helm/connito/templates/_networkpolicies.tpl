{{- define "connito.objects.networkpolicies" -}}
{{- if .Values.networkPolicy.enabled }}
{{- $policy := .Values.networkPolicy }}
{{- $platform := eq .Values.mode "platform" }}
{{- $busPorts := (include "connito.ports" (dict "urls" (splitList "," (include "connito.busUrl" .)) "default" 4222) | fromJson).ports }}
---
# Nothing in, nothing out, unless a policy below allows it.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list . "default-deny" "") | nindent 2 }}
spec:
  podSelector:
    matchLabels: {{- include "connito.selector" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list . "dns-and-bus" "") | nindent 2 }}
spec:
  podSelector:
    matchLabels: {{- include "connito.selector" . | nindent 6 }}
  policyTypes: [Egress]
  egress:
    - ports:
        {{- range concat $policy.dns.ports (ternary (list 5353) list .Values.openshift) | uniq }}
        - { port: {{ . }}, protocol: UDP }
        - { port: {{ . }}, protocol: TCP }
        {{- end }}
      {{- with $policy.dns.to }}
      to: {{- toYaml . | nindent 8 }}
      {{- end }}
    - ports:
        {{- range $busPorts }}
        - { port: {{ . }}, protocol: TCP }
        {{- end }}
      {{- with $policy.bus.to }}
      to: {{- toYaml . | nindent 8 }}
      {{- end }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list . "store" "") | nindent 2 }}
spec:
  podSelector:
    matchLabels: {{- include "connito.selector" . | nindent 6 }}
  policyTypes: [Egress]
  egress:
    - ports:
        {{- if $platform }}
        {{- $sts := ternary .Values.store.sts.endpoint "" (eq .Values.store.auth "web-identity") }}
        {{- $iam := ternary "https://sts" "" (eq .Values.store.auth "iam") }}
        {{- range (include "connito.ports" (dict "urls" (compact (list .Values.store.endpoint .Values.store.publicEndpoint $sts $iam)) "default" 443) | fromJson).ports }}
        - { port: {{ . }}, protocol: TCP }
        {{- end }}
        {{- else }}
        # Trainers follow presigned addresses, whose host and port the platform chooses.
        - { port: {{ (include "connito.ports" (dict "urls" (list (.Values.store.publicEndpoint | default "https://store")) "default" 443) | fromJson).ports | first }}, protocol: TCP }
        {{- end }}
      {{- with $policy.store.to }}
      to: {{- toYaml . | nindent 8 }}
      {{- end }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list . "monitoring" "") | nindent 2 }}
spec:
  podSelector:
    matchLabels: {{- include "connito.selector" . | nindent 6 }}
  policyTypes: [Ingress]
  ingress:
    - ports: [{ port: 8080, protocol: TCP }]
      from:
        {{- if $policy.monitoring.from }}
        {{- toYaml $policy.monitoring.from | nindent 8 }}
        {{- else }}
        - namespaceSelector: {}
        {{- end }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list . "api-clients" "") | nindent 2 }}
spec:
  podSelector:
    matchLabels: {{- include "connito.selector" . | nindent 6 }}
  policyTypes: [Egress]
  egress:
    {{- if $platform }}
    - ports: [{ port: 9090, protocol: TCP }]
      to:
        - podSelector:
            matchLabels: {{- include "connito.selector" . | nindent 14 }}
            matchExpressions:
              - { key: app.kubernetes.io/component, operator: In, values: [coordinator, committer, library] }
    {{- end }}
    {{- if or (not $platform) $policy.platform.to }}
    - ports:
        {{- range $policy.platform.ports }}
        - { port: {{ . }}, protocol: TCP }
        {{- end }}
      {{- with $policy.platform.to }}
      to: {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- end }}
{{- if $platform }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list . "api" "") | nindent 2 }}
spec:
  podSelector:
    matchLabels: {{- include "connito.selector" . | nindent 6 }}
    matchExpressions:
      - { key: app.kubernetes.io/component, operator: In, values: [coordinator, committer, library] }
  policyTypes: [Ingress]
  ingress:
    - ports: [{ port: 9090, protocol: TCP }]
      from:
        - podSelector:
            matchLabels: {{- include "connito.selector" . | nindent 14 }}
        {{- with $policy.api.from }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- if .Values.console.enabled }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list . "page" "") | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "connito.selector" . | nindent 6 }}
      app.kubernetes.io/component: console
  policyTypes: [Ingress]
  ingress:
    - ports: [{ port: 8088, protocol: TCP }]
      {{- with $policy.console.from }}
      from: {{- toYaml . | nindent 8 }}
      {{- end }}
{{- with include "connito.serveUrl" . }}
---
# Readers of the console try experts there.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list $ "page-to-serve" "") | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "connito.selector" $ | nindent 6 }}
      app.kubernetes.io/component: console
  policyTypes: [Egress]
  egress:
    {{- if $.Values.console.serve.url }}
    - ports: [{ port: {{ (include "connito.ports" (dict "urls" (list .) "default" 443) | fromJson).ports | first }}, protocol: TCP }]
    {{- else }}
    - ports: [{ port: http, protocol: TCP }]
      to: [{ podSelector: { matchLabels: { app.kubernetes.io/instance: {{ $.Release.Name }}, connito-workload: serve } } }]
    {{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .Values.nats.enabled $platform }}
---
# Servers talk to each other, and answer clients and who watches them.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list . "nats" "nats") | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "connito.selector" . | nindent 6 }}
      connito-workload: nats
  policyTypes: [Ingress, Egress]
  ingress:
    - ports: [{ port: 6222, protocol: TCP }]
      from: [{ podSelector: { matchLabels: { app.kubernetes.io/instance: {{ .Release.Name }}, connito-workload: nats } } }]
    - ports: [{ port: 4222, protocol: TCP }]
      from:
        - podSelector:
            matchLabels: {{- include "connito.selector" . | nindent 14 }}
        {{- with $policy.api.from }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    - ports:
        - { port: 7777, protocol: TCP }
        - { port: 8222, protocol: TCP }
      from:
        {{- if $policy.monitoring.from }}
        {{- toYaml $policy.monitoring.from | nindent 8 }}
        {{- else }}
        - namespaceSelector: {}
        {{- end }}
  egress:
    - ports: [{ port: 6222, protocol: TCP }]
      to: [{ podSelector: { matchLabels: { app.kubernetes.io/instance: {{ .Release.Name }}, connito-workload: nats } } }]
{{- end }}
{{- if .Values.rollout.enabled }}
---
# The rollout asks Kubernetes' API, and nobody else does.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list . "rollout" "rollout") | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "connito.selector" . | nindent 6 }}
      app.kubernetes.io/component: rollout
  policyTypes: [Egress]
  egress:
    - ports:
        {{- range $policy.apiServer.ports }}
        - { port: {{ . }}, protocol: TCP }
        {{- end }}
      {{- with $policy.apiServer.to }}
      to: {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end }}
{{- with .Values.oidc.issuer }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list $ "oidc" "") | nindent 2 }}
spec:
  podSelector:
    matchLabels: {{- include "connito.selector" $ | nindent 6 }}
    matchExpressions:
      - { key: app.kubernetes.io/component, operator: In, values: [coordinator, library, console] }
  policyTypes: [Egress]
  egress:
    - ports:
        {{- range (include "connito.ports" (dict "urls" (list .) "default" 443) | fromJson).ports }}
        - { port: {{ . }}, protocol: TCP }
        {{- end }}
      {{- with $policy.oidc.to }}
      to: {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end }}
{{- with .Values.tracing.endpoint }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list $ "tracing" "") | nindent 2 }}
spec:
  podSelector:
    matchLabels: {{- include "connito.selector" $ | nindent 6 }}
  policyTypes: [Egress]
  egress:
    - ports:
        {{- range (include "connito.ports" (dict "urls" (list .) "default" 4318) | fromJson).ports }}
        - { port: {{ . }}, protocol: TCP }
        {{- end }}
      {{- with $policy.tracing.to }}
      to: {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end }}
{{- end }}
{{- end -}}
