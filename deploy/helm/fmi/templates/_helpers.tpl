{{- define "fmi.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "fmi.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "fmi.labels" -}}
{{ include "fmi.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* The settings of the server: what the chart decides goes over what the values say. */}}
{{- define "fmi.settings" -}}
{{- $made := dict "listen" "0.0.0.0:50061" "health_listen" "0.0.0.0:50060" "data_dir" "/data" -}}
{{- if eq .Values.mode "cluster" -}}
{{- $_ := set $made "store" .Values.brokers.url -}}
{{- $_ := set $made "store_replicas" (int .Values.brokers.replicas) -}}
{{- if .Values.brokers.loginSecretName -}}
{{- $_ := set $made "store_login" "/etc/fmi/brokers/login" -}}
{{- end -}}
{{- if .Values.brokers.tlsSecretName -}}
{{- $_ := set $made "store_ca" "/etc/fmi/brokers-tls/ca.crt" -}}
{{- if .Values.brokers.clientCertificate -}}
{{- $_ := set $made "store_cert" "/etc/fmi/brokers-tls/tls.crt" -}}
{{- $_ := set $made "store_key" "/etc/fmi/brokers-tls/tls.key" -}}
{{- end -}}
{{- end -}}
{{- else -}}
{{- $_ := set $made "store" "sqlite" -}}
{{- end -}}
{{- if .Values.tls.secretName -}}
{{- $_ := set $made "tls_cert" "/etc/fmi/server/server.crt" -}}
{{- $_ := set $made "tls_key" "/etc/fmi/server/server.key" -}}
{{- if .Values.tls.clientCertificates -}}
{{- $_ := set $made "tls_client_ca" "/etc/fmi/server/ca.crt" -}}
{{- if .Values.tls.revocations -}}
{{- $_ := set $made "tls_crl" "/etc/fmi/server/revoked.pem" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if .Values.tokens.secretName -}}
{{- $_ := set $made "tokens" "/etc/fmi/tokens/tokens.json" -}}
{{- end -}}
{{- if or .Values.tokens.secretName (and .Values.tls.secretName .Values.tls.clientCertificates) -}}
{{- $_ := set $made "operators" .Values.operators -}}
{{- end -}}
{{- if .Values.cohorts -}}
{{- $_ := set $made "cohorts" "/etc/fmi/cohorts" -}}
{{- end -}}
{{- if .Values.metrics.enabled -}}
{{- $_ := set $made "metrics_listen" (printf "0.0.0.0:%d" (int .Values.metrics.port)) -}}
{{- /* The server lets the machine alone read the page, unless it is told that the network is protected. */ -}}
{{- $_ := set $made "insecure" true -}}
{{- end -}}
{{- merge $made .Values.settings | toYaml -}}
{{- end -}}
