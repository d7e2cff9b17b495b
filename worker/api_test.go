package worker_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// api calls the HTTP API of RabbitMQ's management plugin.
func (r *testEnv) api(method, resource string, body any) {
	r.t.Helper()
	base := os.Getenv(devenv.EnvBrokerAPI)
	if base == "" {
		r.t.Fatalf("%s is not set", devenv.EnvBrokerAPI)
	}
	text, err := json.Marshal(body)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(base, "/")+"/api/"+resource, bytes.NewReader(text))
	if err != nil {
		r.t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
	if err != nil {
		r.t.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode >= 300 {
		r.t.Fatalf("%s %s: %s", method, resource, response.Status)
	}
}
