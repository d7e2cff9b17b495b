package codex

import (
	"context"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// An Outcome is how Codex has ended.
type Outcome string

const (
	// Finished: Codex has said that it is done. What it has changed, if anything, is in
	// the clone or in the task's diff.
	Finished Outcome = "finished"
	// Question: Codex needs an answer before it can work. Result.Message has the question.
	Question Outcome = "question"
	// ModelError: the model or its server has failed.
	ModelError Outcome = "model_error"
	// Limited: the account has reached a limit.
	Limited Outcome = "limit"
	// NotLoggedIn: the server has refused the key or the login, or there is none.
	NotLoggedIn Outcome = "not_logged_in"
	// Stalled: Codex has printed nothing for too long, and was ended.
	Stalled Outcome = "stalled"
	// TimedOut: the time limit has passed, and Codex was ended.
	TimedOut Outcome = "time_limit"
	// Garbage: what Codex has printed does not say how it ended.
	Garbage Outcome = "garbage"
)

// A Result says how Codex has ended. Its texts are not redacted. Whoever redacts them can
// cut them afterwards: half of a credential is none that a redactor knows.
type Result struct {
	Outcome Outcome
	// TaskID is Codex's id of the conversation or of the cloud task, "" if it is not
	// known.
	TaskID string
	// Message is the last message of the model after Finished, the question after
	// Question, and what went wrong after any other outcome. It is as long as
	// what is read of Codex, a line of at most 1 MiB.
	Message string
	// Usage counts tokens, if Codex has said so.
	Usage Usage
}

// Usage are the tokens of a conversation.
type Usage struct {
	Input       int64 `json:"input_tokens"`
	CachedInput int64 `json:"cached_input_tokens"`
	Output      int64 `json:"output_tokens"`
}

// A Key reads the key of the model's API when it is used. A credential.Credential is one.
type Key interface {
	Read(ctx context.Context) (secret.String, error)
}

// trimmed is a text of Codex as a Result has it: valid UTF-8, without space around it.
func trimmed(text string) string {
	return strings.TrimSpace(strings.ToValidUTF8(text, "\uFFFD"))
}

// QuestionMark begins the line with which Codex asks instead of working. The prompt has
// to say so.
const QuestionMark = "QUESTION:"

// question returns the question with which a message ends, "" if it asks nothing.
func question(message string) string {
	at := strings.LastIndex("\n"+message, "\n"+QuestionMark)
	if at < 0 {
		return ""
	}
	return strings.TrimSpace(strings.TrimPrefix(message[at:], QuestionMark))
}

// Asks reports whether a message ends like a question, although it has no QuestionMark.
// It is of use only where nothing was changed: a model that has worked may still end
// with an offer.
func Asks(message string) bool {
	return strings.HasSuffix(strings.TrimRight(message, " \t\r\n*_`\"')"), "?")
}

// environment is the part of the worker's variables that codex and the commands of its
// model get: where programs and files are, language, proxies and certificates. All else
// may hold secrets that they do not need.
var environment = []string{
	"PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "LC_MESSAGES",
	"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy",
	"SSL_CERT_FILE", "SSL_CERT_DIR", "CODEX_CA_CERTIFICATE",
}

// Environment returns the variables of environ that codex gets, and those of the names in
// also.
func Environment(environ []string, also ...string) []string {
	wanted := map[string]bool{}
	for _, name := range append(environment, also...) {
		wanted[name] = true
	}
	kept := []string{}
	for _, variable := range environ {
		if name, _, _ := strings.Cut(variable, "="); wanted[name] {
			kept = append(kept, variable)
		}
	}
	return kept
}
