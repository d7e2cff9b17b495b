package address_test

import (
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
)

func TestServers(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"https://github.com":              "https://github.com",
		" https://github.example.com:8/ ": "https://github.example.com:8",
		"https://host/api/v3//":           "https://host/api/v3",
		"http://127.0.0.1:80/x":           "http://127.0.0.1:80/x",
		"http://[::1]:80":                 "http://[::1]:80",
	} {
		if got, err := address.ParseServer(text); err != nil || got.String() != want {
			t.Errorf("ParseServer(%q) = %v, %v, want %s", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		"": "begins with https", "github.com": "begins with https", "ssh://git@host": "begins with https", "https://": "begins with https", "https://:8": "begins with https",
		"https://me:secret-1@host": "login", "https://secret-1@host": "login", "https://host?token=secret-1": "query", "https://host?": "query", "https://host#secret-1": "fragment",
		"http://host/secret-1": "this machine only", "http://127.0.0.1.example.com": "this machine only", "ext::sh -c id": "begins with https", "https://host\n.example": "begins with https",
	} {
		got, err := address.ParseServer(text)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret-1") {
			t.Errorf("ParseServer(%q) = %v, %v, want an error with %q", text, got, err, want)
		}
	}
}
