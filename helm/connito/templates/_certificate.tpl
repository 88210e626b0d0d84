{{- define "connito.objects.certificate" -}}
{{- $root := . -}}
{{- if .Values.tls.certManager.enabled }}
---
# One for every service: as a server by the names of the Services, as a client where one is asked for.
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {{- include "connito.metadata" (list . "tls" "") | nindent 2 }}
spec:
  secretName: {{ include "connito.tlsSecret" . }}
  duration: {{ .Values.tls.certManager.duration }}
  privateKey: { algorithm: ECDSA, size: 256, rotationPolicy: Always }
  usages: [server auth, client auth]
  dnsNames:
    {{- range (include "connito.components" . | fromJson).items }}
    - {{ include "connito.object" (list $root .name) }}.{{ $root.Release.Namespace }}.svc
    {{- end }}
    {{- range .Values.tls.certManager.dnsNames }}
    - {{ . | quote }}
    {{- end }}
  issuerRef:
    name: {{ required "tls.certManager.issuer.name is empty: name the issuer that signs" .Values.tls.certManager.issuer.name | quote }}
    kind: {{ .Values.tls.certManager.issuer.kind }}
    group: {{ .Values.tls.certManager.issuer.group }}
{{- end }}
{{- end -}}
