package codex

import "strings"

// reasons are parts of messages in which Codex says why it has failed, in lower case, the
// first that fits. Codex prints no codes: these are the words of the release that the
// tests run, and of its source.
var reasons = []struct {
	outcome Outcome
	parts   []string
}{
	{NotLoggedIn, []string{
		"401 unauthorized", "403 forbidden", "not logged in", "not signed in", "missing environment variable", "log out and sign in again",
		"could not be refreshed", "invalid_api_key", "incorrect api key",
	}},
	{Limited, []string{
		"usage limit", "quota exceeded", "429 too many requests", "rate limit", "rate_limit", "insufficient_quota", "out of credits", "spend cap",
	}},
	{Garbage, []string{
		"stream closed before response.completed", "error decoding response body", "failed to parse responsecompleted", "decode error",
	}},
}

// classify says what kind of failure a message of Codex is about.
func classify(message string) Outcome {
	lower := strings.ToLower(strings.ReplaceAll(message, "\u2019", "'"))
	for _, reason := range reasons {
		for _, part := range reason.parts {
			if strings.Contains(lower, part) {
				return reason.outcome
			}
		}
	}
	return ModelError
}
