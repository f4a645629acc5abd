{{- define "streamrec.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{- define "streamrec.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "streamrec.labels" -}}
{{ include "streamrec.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- /* The bundle's source, of which there is at most one: image, claim, init or store. */}}
{{- define "streamrec.bundleSource" -}}
{{- $sources := list -}}
{{- with .Values.bundle -}}
{{- if .existingClaim }}{{ $sources = append $sources "claim" }}{{ end -}}
{{- if .image }}{{ $sources = append $sources "init" }}{{ end -}}
{{- if .objectStore.path }}{{ $sources = append $sources "store" }}{{ end -}}
{{- end -}}
{{- if gt (len $sources) 1 -}}
{{- fail "Set one of bundle.existingClaim, bundle.image and bundle.objectStore.path: a pod serves one bundle." -}}
{{- end -}}
{{- first $sources | default "image" -}}
{{- end -}}

{{- define "streamrec.redisUrl" -}}
{{- if and .Values.redis.deploy .Values.redis.url -}}
{{- fail "Set redis.url or redis.deploy, not both: the service uses one Redis." -}}
{{- end -}}
{{- if hasKey .Values.settings "STREAMREC_REDIS_URL" -}}
{{- fail "Set redis.url, not settings.STREAMREC_REDIS_URL: the chart opens the network to it and shares it between replicas." -}}
{{- end -}}
{{- if .Values.redis.deploy -}}
redis://{{ include "streamrec.fullname" . }}-redis:6379/0
{{- else if and .Values.redis.url .Values.redis.tlsSecret -}}
{{- if not (hasPrefix "rediss://" .Values.redis.url) -}}
{{- fail "redis.tlsSecret needs a redis.url that begins with rediss://, or its certificates are never used." -}}
{{- end -}}
{{- $verified := contains "ssl_ca_certs=" .Values.redis.url -}}
{{ .Values.redis.url }}
{{- if not $verified }}{{ ternary "&" "?" (contains "?" .Values.redis.url) }}ssl_ca_certs=/etc/redis-tls/ca.crt{{ end -}}
{{- else -}}
{{ .Values.redis.url }}
{{- end -}}
{{- end -}}

{{- /* A setting's value as text. Numbers from a file are floats here, and a large one would be written as 1e+06. */}}
{{- define "streamrec.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ . | int64 }}{{ else }}{{ . }}{{ end -}}
{{- end -}}

{{- /* The settings that only a Secret may hold, as name: value. A Redis counts whether its address has a password or not:
       where to look for one (user:password@, ?password=) is for the client library to know. */}}
{{- define "streamrec.secrets" -}}
{{- range $name, $value := .Values.settings }}
{{- $secret := has $name (list "STREAMREC_USER_HASH_KEY" "STREAMREC_API_KEYS" "STREAMREC_ADMIN_KEYS") }}
{{- if or $secret (regexMatch "://.*@" (include "streamrec.text" $value)) }}
{{ $name }}: {{ include "streamrec.text" $value | quote }}
{{- end }}
{{- end }}
{{- with include "streamrec.redisUrl" . }}
STREAMREC_REDIS_URL: {{ . | quote }}
{{- end }}
{{- end -}}

{{- /* The resources of the service's container: what its processes take together, except where `resources` says otherwise. */}}
{{- define "streamrec.resources" -}}
{{- $workers := max 1 (int (.Values.settings.STREAMREC_WORKERS | default 1)) -}}
{{- $threads := max 1 (int (.Values.settings.STREAMREC_THREADS | default 1)) -}}
{{- $memory := add .Values.sizing.memoryMi (mul $workers .Values.sizing.memoryMiPerWorker) -}}
{{- $requests := dict "cpu" (mul $workers $threads | toString) "memory" (printf "%dMi" $memory) -}}
{{- $limits := dict "memory" (printf "%dMi" (mul 2 $memory)) -}}
{{- if .Values.gpu.enabled }}{{ $limits = set $limits .Values.gpu.resource .Values.gpu.count }}{{ end -}}
{{- toYaml (mergeOverwrite (dict "requests" $requests "limits" $limits) (deepCopy .Values.resources)) -}}
{{- end -}}

{{- /* p95 of the wait in the queue, in seconds; 0 where nobody asked anything. */}}
{{- define "streamrec.queueWait" -}}
{{- $of := printf "stage=\"queue\",namespace=%q,service=%q" .Release.Namespace (include "streamrec.fullname" .) -}}
(histogram_quantile(0.95, sum by (le) (rate(streamrec_stage_seconds_bucket{ {{- $of -}} }[2m]))) > 0) or vector(0)
{{- end -}}

{{- define "streamrec.hardened" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
{{- end -}}

{{- /* Another name than the service's, so that no selector of the service's finds it. */}}
{{- define "streamrec.redisSelector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}-redis
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- /* The wait grows without bound near saturation, so a step may only double the replicas. They go one by one: what a
       lost replica's memory cached is encoded again. */}}
{{- define "streamrec.scalingBehaviour" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - type: Percent
      value: 100
      periodSeconds: 60
scaleDown:
  stabilizationWindowSeconds: 300
  policies:
    - type: Pods
      value: 1
      periodSeconds: 60
{{- end -}}
