{{/* Where the console finds a server of experts; empty where it has no key of this release's own. */}}
{{- define "connito.serveUrl" -}}
{{- $own := and .Values.serve.enabled .Values.console.serve.secretName -}}
{{- .Values.console.serve.url | default (ternary (printf "http://%s.%s.svc/v1" (include "connito.object" (list . "serve")) .Release.Namespace) "" (not (empty $own))) -}}
{{- end -}}

{{- define "connito.objects.serve" -}}
{{- if .Values.serve.enabled }}
{{- $conf := mergeOverwrite (deepCopy .Values.pods) (deepCopy .Values.serve) }}
{{- $keys := required "serve.keysSecret is empty: name the Secret whose keys.yaml says who may ask" $conf.keysSecret }}
{{- $claim := required "serve.existingClaim is empty: name the volume that holds the base and the shelf" $conf.existingClaim }}
---
# `connito serve`: a base and its experts behind OpenAI's interface. It reads a folder and needs neither bus nor store.
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "connito.metadata" (list . "serve" "serve") | nindent 2 }}
spec:
  replicas: {{ $conf.replicas }}
  selector:
    matchLabels:
      {{- include "connito.selector" . | nindent 6 }}
      connito-workload: serve
  template:
    metadata: {{- include "connito.podMetadata" (list . "serve" $conf "serve") | nindent 6 }}
    spec:
      {{- include "connito.placement" (list . "serve" $conf) | nindent 6 }}
      terminationGracePeriodSeconds: {{ $conf.terminationGracePeriodSeconds | default 30 }}
      containers:
        - name: serve
          image: {{ include "connito.image" (list . (include "connito.variant" (list "serve" "serve" $conf)) $conf.image) | quote }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          securityContext: {{- include "connito.containerSecurity" . | nindent 12 }}
          env:
            - { name: CONNITO_SERVE_HOST, value: 0.0.0.0 }
            - { name: CONNITO_SERVE_PORT, value: "8080" }
            - { name: CONNITO_SERVE_KEYS, value: /etc/connito/keys/keys.yaml }
            - { name: CONNITO_SERVE_BASE, value: {{ printf "/var/lib/connito/%s" $conf.base | quote }} }
            - { name: CONNITO_SERVE_EXPERTS, value: {{ $conf.experts | quote }} }
            - { name: CONNITO_SERVE_CACHE_TOKENS, value: {{ $conf.cacheTokens | int | quote }} }
            - { name: CONNITO_SHELF, value: {{ printf "/var/lib/connito/%s" $conf.shelf | quote }} }
            {{- include "connito.moreEnv" $conf | nindent 12 }}
          {{- with $conf.envFrom }}
          envFrom: {{- toYaml . | nindent 12 }}
          {{- end }}
          ports: [{ name: http, containerPort: 8080 }]
          startupProbe: { httpGet: { path: /healthz, port: http }, periodSeconds: 10, failureThreshold: 180 }
          livenessProbe: { httpGet: { path: /healthz, port: http }, periodSeconds: 20, failureThreshold: 3 }
          readinessProbe: { httpGet: { path: /readyz, port: http }, periodSeconds: 5 }
          resources: {{- toYaml $conf.resources | nindent 12 }}
          volumeMounts:
            - { name: library, mountPath: /var/lib/connito }
            - { name: keys, mountPath: /etc/connito/keys, readOnly: true }
            - { name: tmp, mountPath: /tmp }
            {{- with $conf.extraVolumeMounts }}{{ toYaml . | nindent 12 }}{{ end }}
        {{- with $conf.extraContainers }}{{ toYaml . | nindent 8 }}{{ end }}
      volumes:
        - { name: library, persistentVolumeClaim: { claimName: {{ $claim | quote }} } }
        - { name: keys, secret: { secretName: {{ $keys | quote }}, defaultMode: 0440 } }
        - { name: tmp, emptyDir: { sizeLimit: 1Gi } }
        {{- with $conf.extraVolumes }}{{ toYaml . | nindent 8 }}{{ end }}
---
apiVersion: v1
kind: Service
metadata:
  {{- include "connito.metadata" (list . "serve" "serve") | nindent 2 }}
    connito-workload: serve
spec:
  selector:
    {{- include "connito.selector" . | nindent 4 }}
    connito-workload: serve
  ports: [{ name: http, port: 80, targetPort: http, appProtocol: http }]
{{- if .Values.networkPolicy.enabled }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "connito.metadata" (list . "serve" "serve") | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "connito.selector" . | nindent 6 }}
      connito-workload: serve
  policyTypes: [Ingress]
  ingress:
    - ports: [{ port: http, protocol: TCP }]
      {{- with $conf.from }}
      from:
        - podSelector:
            matchLabels:
              {{- include "connito.selector" $ | nindent 14 }}
              app.kubernetes.io/component: console
        {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end }}
{{- end }}
{{- end -}}
