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
{{- if .Values.redis.deploy -}}
redis://{{ include "streamrec.fullname" . }}-redis:6379/0
{{- else -}}
{{ .Values.redis.url }}
{{- end -}}
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
