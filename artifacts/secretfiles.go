package artifacts

import (
	"encoding/json"
	"fmt"
	"html"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
)

// Limits on files with secrets, because the workspace's are written by others.
const (
	maxSecretFile  = 1 << 20
	maxSecretFiles = 32
	maxRemembered  = 2000
)

// A secretFile is a file whose contents are secret, all or in part.
type secretFile struct {
	path string
	kind fileKind
}

type fileKind int

const (
	// variables are lines NAME=value, of which names tell the secret ones.
	variables fileKind = iota
	// secretLines are secrets, one a line.
	secretLines
	// oneSecret is a secret of one or several lines, a document in JSON, PEM or XML with
	// secrets, or lines NAME=value.
	oneSecret
	// urls are URLs with logins, as git stores them.
	urls
	// pgpass and netrc are the password files of PostgreSQL and of FTP and HTTP
	// clients.
	pgpass
	netrc
	// composeFile is a compose file, which only names secrets.
	composeFile
)

// exampleFile matches files that only show which variables there are.
var exampleFile = regexp.MustCompile(`(?i)\.(?:example|sample|template|tmpl|dist|defaults?)$`)

// files returns the files that may have secrets:
//
//   - those that the rules name;
//   - those that a variable names: PGPASSFILE, NETRC, GOOGLE_APPLICATION_CREDENTIALS, and
//     NAME_FILE where the value of NAME would be secret;
//   - those of docker, git, curl, psql, the AWS tools and Codex, which the commands of plans
//     use or can read;
//   - the .env files of the workspace, and the secrets of its compose files.
func (r *Redactor) files() (list []secretFile) {
	for _, path := range r.rules.Files {
		list = append(list, secretFile{path, secretLines})
	}
	home, docker, codex := "", "", ""
	for _, variable := range r.environ {
		name, value, _ := strings.Cut(variable, "=")
		base, isFile := strings.CutSuffix(strings.ToUpper(name), "_FILE")
		switch {
		case name == "HOME":
			home = value
		case name == "DOCKER_CONFIG":
			docker = value
		case name == "CODEX_HOME":
			codex = value
		case !filepath.IsAbs(value):
		case name == "PGPASSFILE":
			list = append(list, secretFile{value, pgpass})
		case name == "NETRC":
			list = append(list, secretFile{value, netrc})
		case name == "GOOGLE_APPLICATION_CREDENTIALS", isFile && isSecret(base, "a value", r.rules.Names):
			list = append(list, secretFile{value, oneSecret})
		}
	}
	if filepath.IsAbs(home) {
		list = append(list, secretFile{filepath.Join(home, ".pgpass"), pgpass}, secretFile{filepath.Join(home, ".netrc"), netrc},
			secretFile{filepath.Join(home, ".git-credentials"), urls}, secretFile{filepath.Join(home, ".aws/credentials"), variables})
		if docker == "" {
			docker = filepath.Join(home, ".docker")
		}
		if codex == "" {
			codex = filepath.Join(home, ".codex")
		}
	}
	if filepath.IsAbs(docker) {
		list = append(list, secretFile{filepath.Join(docker, "config.json"), oneSecret})
	}
	if filepath.IsAbs(codex) {
		list = append(list, secretFile{filepath.Join(codex, "auth.json"), oneSecret})
	}
	// The last, because others write it: it cannot push out the operator's secrets.
	if r.rules.Workspace != "" {
		found, _ := filepath.Glob(filepath.Join(globEscape.Replace(r.rules.Workspace), ".env.*")) // the pattern is valid
		found = slices.DeleteFunc(found, exampleFile.MatchString)
		list = append(list, secretFile{filepath.Join(r.rules.Workspace, ".env"), variables})
		for _, path := range found[:min(len(found), maxSecretFiles)] {
			list = append(list, secretFile{path, variables})
		}
		for _, name := range composeFiles {
			path := filepath.Join(r.rules.Workspace, name)
			if text, err := readSecretFile(path); err == nil {
				paths, _ := composeSecrets(text)
				list = append(list, secretFile{path, composeFile})
				for _, path := range paths[:min(len(paths), maxSecretFiles)] {
					if !filepath.IsAbs(path) {
						path = filepath.Join(r.rules.Workspace, path)
					}
					list = append(list, secretFile{path, oneSecret})
				}
			}
		}
	}
	return list
}

// composeFiles are the names under which compose looks for its files.
var composeFiles = []string{"compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml",
	"compose.override.yaml", "compose.override.yml", "docker-compose.override.yaml", "docker-compose.override.yml"}

var (
	composeTop    = regexp.MustCompile(`(?m)^["']?secrets["']?:(.*(?:\n(?:[ \t#].*)?)*)`)
	composeSource = regexp.MustCompile(`(?m)(?:^|[ \t{,])["']?(file|environment)["']?:[ \t]*("[^"\n]*"|'[^'\n]*'|[^\s,}#"'][^\n,}#]*)`)
)

// composeSecrets returns the files and the variables that are secrets in a compose file.
// Paths with variables in them are left out. It does not parse YAML: others write the
// file, and the parser takes minutes for 1 MiB of brackets. Secrets behind anchors, and in
// a file that is one line of JSON, are not found.
func composeSecrets(text string) (files, variables []string) {
	block := composeTop.FindStringSubmatch(strings.ReplaceAll(text, "\r\n", "\n"))
	if block == nil {
		return nil, nil
	}
	for _, match := range composeSource.FindAllStringSubmatch(block[1], -1) {
		switch value := strings.Trim(Trim(match[2]), `"'`); {
		case value == "" || strings.Contains(value, "$"):
		case match[1] == "file":
			files = append(files, value)
		default:
			variables = append(variables, value)
		}
	}
	return files, variables
}

// composeVariables are the values of the variables that compose files in the workspace
// name as secrets, in the environment and in .env.
func (r *Redactor) composeVariables() (found []string) {
	var names []string
	for _, name := range composeFiles {
		if text, err := readSecretFile(filepath.Join(r.rules.Workspace, name)); err == nil {
			_, variables := composeSecrets(text)
			names = append(names, variables...)
		}
	}
	if len(names) == 0 {
		return nil
	}
	for _, variable := range r.environ {
		if name, value, _ := strings.Cut(variable, "="); slices.Contains(names, name) {
			found = append(found, value)
		}
	}
	if text, err := readSecretFile(filepath.Join(r.rules.Workspace, ".env")); err == nil {
		for _, variable := range parseVariables(text) {
			if slices.Contains(names, variable.name) {
				found = append(found, variable.values...)
			}
		}
	}
	return found
}

var globEscape = strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`)

// Refresh reads the files with secrets again if they have changed since. It remembers
// what they had before. Files that cannot be read have no secrets. A step calls it at
// its beginning and before each command, because files change while the worker runs.
func (r *Redactor) Refresh() {
	if r == nil || r.rules.Workspace == "" && len(r.rules.Files) == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	files := r.files()
	var state strings.Builder
	for _, file := range files {
		if info, err := os.Stat(file.path); err == nil {
			inode, changed := uint64(0), syscall.Timespec{}
			if system, ok := info.Sys().(*syscall.Stat_t); ok {
				inode, changed = system.Ino, system.Ctim
			}
			fmt.Fprintf(&state, "%s %d %d %d %v\n", file.path, info.Size(), inode, info.ModTime().UnixNano(), changed)
		}
	}
	if state.String() == r.state {
		return
	}
	r.state = state.String()
	known := len(r.remembered)
	remember := func(secrets []string) {
		for _, secret := range secrets {
			if len(secret) >= minAddedSecret && !slices.Contains(harmless, strings.ToLower(secret)) && len(r.remembered) < maxRemembered {
				r.remembered[secret] = struct{}{}
			}
		}
	}
	for _, file := range files {
		if text, err := readSecretFile(file.path); err == nil {
			remember(file.secrets(text, r.rules.Names))
		}
	}
	if r.rules.Workspace != "" {
		remember(r.composeVariables())
	}
	if len(r.remembered) > known {
		r.compile()
	}
}

// readSecretFile reads a regular file. Opening anything else could block for ever.
func readSecretFile(path string) (string, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() || info.Size() > maxSecretFile {
		return "", fmt.Errorf("%s is no file of at most %d bytes", path, maxSecretFile)
	}
	text, err := io.ReadAll(io.LimitReader(file, maxSecretFile))
	return string(text), err
}

// secrets are the secrets in the text of a file.
func (f secretFile) secrets(text string, names []string) (found []string) {
	switch f.kind {
	case variables:
		return variableSecrets(text, names)
	case secretLines:
		if strings.Contains(text, "-----BEGIN ") {
			found = append(found, Trim(text))
		}
		for line := range strings.SplitSeq(plainText(text), "\n") {
			if line = Trim(line); line != "" && !commonLine.MatchString(line) {
				found = append(found, line)
			}
		}
		for _, variable := range parseVariables(text) {
			found = append(found, variable.values...)
		}
	case oneSecret:
		trimmed := Trim(text)
		switch {
		case json.Valid([]byte(trimmed)) && strings.ContainsAny(trimmed[:1], "{["):
			return documentSecrets(trimmed)
		case strings.Contains(trimmed, "-----BEGIN "):
			return pemSecrets(trimmed)
		case !strings.Contains(trimmed, "\n"):
			return []string{trimmed}
		case hasVariables(text) || !utf8.ValidString(text):
			return variableSecrets(text, names)
		case strings.HasPrefix(trimmed, "<"):
			return elementSecrets(trimmed, names)
		}
		return lineSecrets(trimmed)
	case urls:
		for _, login := range address.Logins(text) {
			found = append(found, login.Password)
		}
	case pgpass:
		for line := range strings.Lines(text) {
			// The fifth field; a colon in a field is written as \:.
			fields := strings.Split(strings.ReplaceAll(Trim(line), `\:`, "\x00"), ":")
			if len(fields) == 5 && !strings.HasPrefix(line, "#") {
				found = append(found, strings.ReplaceAll(strings.ReplaceAll(fields[4], "\x00", ":"), `\\`, `\`))
			}
		}
	case netrc:
		words := strings.Fields(text)
		for i, word := range words[:max(0, len(words)-1)] {
			if word == "password" {
				found = append(found, strings.Trim(words[i+1], `"`))
			}
		}
	}
	return found
}

// hasVariables reports whether a text has a line NAME=value. The last line of a text in
// base64 only looks like one.
func hasVariables(text string) bool {
	return slices.ContainsFunc(parseVariables(text), func(v fileVariable) bool {
		return slices.ContainsFunc(v.values, func(value string) bool { return strings.Trim(value, "=") != "" })
	})
}

var (
	pemBlock = regexp.MustCompile(`(?s)-----BEGIN [^\n]*?-----.*?-----END [^\n]*?-----`)
	// publicBlock matches the first line of a block in PEM that everybody may have.
	publicBlock = regexp.MustCompile(`^-----BEGIN (?:(?:TRUSTED |X509 )?CERTIFICATE|X509 CRL|(?:[A-Z]+ )?PUBLIC KEY(?: BLOCK)?|(?:DH|EC) PARAMETERS)-----`)
)

// pemSecrets are the secrets in PEM: the whole text, since there may be a passphrase beside
// a key. But of a file with certificates only, the names between them are no secret.
func pemSecrets(text string) []string {
	blocks := pemBlock.FindAllString(text, -1)
	if len(blocks) == 0 || !publicBlock.MatchString(blocks[0]) || slices.ContainsFunc(blocks, func(block string) bool { return !publicBlock.MatchString(block) }) {
		return []string{text}
	}
	return blocks
}

// xmlElement matches an element of XML that has only text.
var xmlElement = regexp.MustCompile(`<([A-Za-z][A-Za-z0-9_.-]*)(?:\s[^<>]*)?>([^<>]+)</`)

// elementSecrets are the secrets in XML, by the names of elements.
func elementSecrets(text string, names []string) (found []string) {
	for _, element := range xmlElement.FindAllStringSubmatch(text, -1) {
		if value := html.UnescapeString(Trim(element[2])); isSecret(element[1], value, names) {
			found = append(found, value)
		}
	}
	return found
}

// plainLine matches lines that many texts have: comments, a short word, the name or the
// address of a machine, and a URL without a login and a query.
var plainLine = regexp.MustCompile(`^(?:#(?:[!#\s].*)?|[A-Za-z]?[a-z]{0,14}|[A-Za-z_]+[=:]|(?:[a-z0-9-]{1,63}\.)+[a-z]{2,24}(?::[0-9]+)?|[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?:[:/][0-9]+)?|[a-z][a-z0-9+.-]*://[^@?\s]*)$`)

// maxSecretLines limits the lines of one file that are secret each.
const maxSecretLines = 500

// lineSecrets are the secrets in a text of several lines that says nothing about what they
// are, such as a key in base64: each line, and all lines together, as programs read a key,
// so that its last line may be short.
func lineSecrets(text string) []string {
	var found []string
	plain := false
	for line := range strings.SplitSeq(plainText(text), "\n") {
		switch line = Trim(line); {
		case line == "":
		case plainLine.MatchString(line) || commonLine.MatchString(line):
			plain = plain || len(line) >= lineFrom
		case len(found) < maxSecretLines:
			found = append(found, line)
		}
	}
	if all := strings.Join(found, ""); !plain && len(all) <= wholeUpTo {
		found = append(found, all)
	}
	return slices.DeleteFunc(found, func(line string) bool { return len(line) < lineFrom })
}

// documentSecrets are the secrets in a JSON document: by their names, and all texts of a
// list, which have none.
func documentSecrets(text string) []string {
	f := &forms{patterns: map[string]*pattern{}}
	var found []string
	var list []any
	if json.Unmarshal([]byte(text), &list) == nil {
		for _, member := range list {
			if secret, is := member.(string); is {
				found = append(found, secret)
			}
		}
	}
	f.each = func(secret string) { found = append(found, secret) }
	f.document(text)
	return found
}

// variableSecrets are the secrets among variables: by their names, and logins in URLs.
func variableSecrets(text string, names []string) (found []string) {
	for _, variable := range parseVariables(text) {
		for _, value := range variable.values {
			if isSecret(variable.name, value, names) {
				found = append(found, value)
			}
			value := withScheme(variable.name, value)
			for _, login := range address.Logins(value) {
				if len(login.Password) >= shortPassword {
					found = append(found, login.Password)
				}
			}
			found = append(found, urlSecrets(value, names)...)
		}
	}
	return found
}

// A fileVariable is a variable in a file. values are its value as programs may read it:
// with and without quotes and escapes.
type fileVariable struct {
	name   string
	values []string
}

var fileVariableName = regexp.MustCompile(`(?m)^[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_.-]*)[ \t]*[=:][ \t]*`)

// parseVariables reads files as docker compose, shells and others do. A quoted value may
// have several lines.
func parseVariables(text string) (list []fileVariable) {
	text = strings.ReplaceAll(text, "\r\n", "\n")
	for text != "" {
		match := fileVariableName.FindStringSubmatchIndex(text)
		if match == nil {
			return list
		}
		name := text[match[2]:match[3]]
		text = text[match[1]:]
		line, _, _ := strings.Cut(text, "\n")
		rest := len(line)
		values := []string{Trim(line)}
		if line != "" && (line[0] == '"' || line[0] == '\'') {
			if end := closingQuote(text); end > 0 {
				quoted := text[1:end]
				values = append(values, quoted)
				if line[0] == '"' {
					values = append(values, strings.NewReplacer(`\n`, "\n", `\r`, "\r", `\t`, "\t", `\"`, `"`, `\\`, `\`, `\$`, "$", "$$", "$").Replace(quoted))
				}
				rest = max(rest, end)
			}
		} else if value, _, commented := strings.Cut(line, " #"); commented {
			values = append(values, Trim(value))
		}
		slices.Sort(values)
		list = append(list, fileVariable{name, slices.Compact(values)})
		text = text[rest:]
	}
	return list
}

// closingQuote returns where the quote ends that a text begins with, or 0.
func closingQuote(text string) int {
	for i := 1; i < min(len(text), wholeUpTo); i++ {
		switch {
		case text[i] == '\\' && text[0] == '"':
			i++
		case text[i] == text[0]:
			return i
		}
	}
	return 0
}
