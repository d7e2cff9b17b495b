package artifacts

import (
	"path"
	"regexp"
	"slices"
	"strings"
)

// moonMindName matches the names of variables whose values MoonMind takes for secret
// (docs/moonmind.md#secrets). Its rule is the minimum.
var moonMindName = regexp.MustCompile(`(?i)(?:^|[^a-z0-9])(?:token|secret|password|key|credential|auth)(?:$|[^a-z0-9])`)

// Words of names whose values are secret too (docs/moonmind.md#c19), and endings of
// such words: PGPASSWORD, DB_PASS, GITHUB_PAT, API_KEYS, MYAPIKEY.
var (
	secretWords = []string{
		"pass", "passwd", "passphrase", "pwd", "pat", "pats", "keys", "tokens", "secrets", "passwords", "credentials", "creds", "apikeys",
		"auths", "authorization", "bearer", "jwt", "cookie", "cookies", "signing", "signature", "salt", "pepper", "otp", "totp", "webhook", "pem",
	}
	secretEndings = []string{"password", "passwd", "passphrase", "passcode", "secret", "token", "apikey", "accesskey", "secretkey", "privatekey", "masterkey", "signingkey", "credential", "pwd"}
	// wordBreaks are where a name in camel case has a new word.
	wordBreaks = regexp.MustCompile(`([a-z0-9])([A-Z])`)
	notInWords = regexp.MustCompile(`[^A-Za-z0-9]+`)
	// notSecretNames have such a word and a value that is no secret: the working
	// directory, and the places of files, whose contents are secret (see secretFiles).
	notSecretNames = regexp.MustCompile(`(?i)^(?:pwd|oldpwd|.*_(?:file|path|dir|directory|sock|socket)|google_application_credentials|pgpassfile)$`)
)

// harmless are values that say nothing, and that many texts contain. MoonMind's rule
// masks them; the words that were added to it do not.
var harmless = []string{"true", "false", "yes", "no", "on", "off", "none", "null", "nil", "enabled", "disabled", "default", "required", "optional", "auto", "always", "never"}

// minAddedSecret is the least length of a value that is secret only by the added
// words or because a file in the workspace says so, in bytes.
const minAddedSecret = 4

// isSecret reports whether the value of a variable is secret. names are further names,
// in which * and ? stand for other characters.
func isSecret(name, value string, names []string) bool {
	if value == "" {
		return false
	}
	if moonMindName.MatchString(name) || slices.ContainsFunc(names, func(pattern string) bool { return matchesName(pattern, name) }) {
		return true
	}
	if notSecretNames.MatchString(name) || len(value) < minAddedSecret || slices.Contains(harmless, strings.ToLower(value)) {
		return false
	}
	return slices.ContainsFunc(notInWords.Split(wordBreaks.ReplaceAllString(name, "${1}_$2"), -1), func(word string) bool {
		word = strings.ToLower(word)
		return slices.Contains(secretWords, word) || slices.ContainsFunc(secretEndings, func(ending string) bool { return strings.HasSuffix(word, ending) })
	}) || isSecretWhole(name)
}

// isSecretWhole finds endings that camel case has cut in two, as in apiKey.
func isSecretWhole(name string) bool {
	name = strings.ToLower(name)
	return slices.ContainsFunc(secretEndings, func(ending string) bool { return strings.HasSuffix(name, ending) })
}

// matchesName compares a name without regard to case, as people write variables.
func matchesName(pattern, name string) bool {
	matched, err := path.Match(strings.ToUpper(pattern), strings.ToUpper(name))
	return err == nil && matched
}
