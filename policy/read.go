package policy

import (
	"fmt"
	"maps"
	"math"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
)

// A reader reads one file into policy. It goes on after an error, so that all of them
// are told at once.
type reader struct {
	file   string
	policy *Policy
	// base has the built-in services, nil while those are read themselves.
	base map[string]*Service
	errs Errors
}

// fail adds an error about a node.
func (r *reader) fail(node ast.Node, field, problem, cure string) {
	e := &Error{File: r.file, Field: field, Problem: problem, Cure: cure}
	if at := position(node); at != nil {
		e.Line, e.Column = at.Line, at.Column
	}
	r.errs = append(r.errs, e)
}

// position is where a node begins.
func position(node ast.Node) *token.Position {
	if mapping, is := node.(*ast.MappingNode); is && !mapping.IsFlowStyle && len(mapping.Values) > 0 {
		node = mapping.Values[0].Key // the mapping's own token is the first colon
	}
	if value, is := node.(*ast.MappingValueNode); is {
		node = value.Key
	}
	if node == nil || node.GetToken() == nil {
		return nil
	}
	return node.GetToken().Position
}

func (r *reader) origin(node ast.Node) Origin {
	if r.base == nil {
		return Origin{}
	}
	o := Origin{File: r.file}
	if at := position(node); at != nil {
		o.Line = at.Line
	}
	return o
}

// An entry is a field of a mapping.
type entry struct {
	name       string
	key, value ast.Node
}

// entries returns the fields of a mapping whose keys are free. what says what the
// value should be.
func (r *reader) entries(node ast.Node, field, what string) []entry {
	var values []*ast.MappingValueNode
	switch n := node.(type) {
	case *ast.MappingNode:
		values = n.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{n}
	case nil, *ast.NullNode:
		return nil
	default:
		if !r.special(node, field) {
			r.fail(node, field, "it must be "+what+", not "+kind(node), "Write each field on a line of its own, indented, as name: value")
		}
		return nil
	}
	var list []entry
	lines := map[string]int{}
	for _, v := range values {
		if v.Key == nil {
			continue
		}
		if v.Key.IsMergeKey() {
			r.fail(v.Key, field, "<< is not supported here", "Write the fields out")
			continue
		}
		name, isText := scalar(v.Key)
		if !isText {
			if !r.special(v.Key, field) {
				r.fail(v.Key, field, "a name is expected before the colon, not "+kind(v.Key), "Put it in quotes if it is meant")
			}
			continue
		}
		// Names of services do not differ in case, nor do two fields.
		if line, twice := lines[strings.ToLower(name)]; twice {
			r.fail(v.Key, field, fmt.Sprintf("%s is there twice, first in line %d", quoted(name), line), "Keep one")
			continue
		}
		if at := position(v.Key); at != nil {
			lines[strings.ToLower(name)] = at.Line
		}
		list = append(list, entry{name, v.Key, v.Value})
	}
	return list
}

// fields returns the fields of a mapping that has those below path of [Fields].
func (r *reader) fields(node ast.Node, field, path string) []entry {
	known := children(path)
	var list []entry
	for _, e := range r.entries(node, field, "fields") {
		if slices.Contains(known, e.name) {
			list = append(list, e)
			continue
		}
		cure := "Known here: " + strings.Join(known, ", ")
		if meant := nearest(e.name, known); meant != "" {
			cure = "Did you mean " + meant + "? " + cure
		} else if elsewhere := whereIs(e.name); elsewhere != "" {
			cure = e.name + " belongs under " + elsewhere + ". " + cure
		}
		r.fail(e.key, field, "there is no field "+quoted(e.name), cure)
	}
	return list
}

// whereIs returns the parent of the only field of that name, "" for none.
func whereIs(name string) string {
	found := ""
	for _, f := range Fields {
		parent, last := cutLast(f.Path)
		if last != name || parent == "" || strings.Contains(parent, "overrides") {
			continue
		}
		if found != "" {
			return ""
		}
		found = parent
	}
	return found
}

func cutLast(path string) (parent, last string) {
	at := strings.LastIndex(path, ".")
	if at < 0 {
		return "", path
	}
	return path[:at], path[at+1:]
}

// special tells about what the file may not have anywhere, and says whether node is
// that. Aliases are refused rather than limited: a file that is read at night should
// say what it means where it means it.
func (r *reader) special(node ast.Node, field string) bool {
	switch n := node.(type) {
	case *ast.AliasNode:
		r.fail(n, field, "a text that begins with * has a meaning in YAML", "Put it in quotes: \"*…\"")
	case *ast.AnchorNode:
		r.fail(n, field, "a value that begins with & has a meaning in YAML, which is not supported here", "Put it in quotes, or write the value out where it is needed")
	case *ast.TagNode:
		r.fail(n, field, "a value that begins with ! has a meaning in YAML, which is not supported here", "Put it in quotes")
	case *ast.DirectiveNode:
		r.fail(n, field, "a line that begins with % has a meaning in YAML, which is not supported here", "Remove it")
	default:
		return false
	}
	return true
}

// kind says what a node is, for messages.
func kind(node ast.Node) string {
	switch n := node.(type) {
	case nil, *ast.NullNode:
		return "empty"
	case *ast.MappingNode, *ast.MappingValueNode:
		return "fields"
	case *ast.SequenceNode:
		return "a list"
	case *ast.StringNode:
		return "the text " + quoted(n.Value)
	case *ast.LiteralNode:
		return "a text of several lines"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "the number " + n.GetToken().Value
	case *ast.BoolNode:
		return n.GetToken().Value
	}
	return "something else"
}

// scalar returns the text of a value as it is written. That of a number is a text
// too: 8080 may be a name.
func scalar(node ast.Node) (string, bool) {
	switch n := node.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		if n.Value != nil {
			return n.Value.Value, true
		}
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return n.GetToken().Value, true
	}
	return "", false
}

// text returns a text that is one line and not empty.
func (r *reader) text(e entry, field string) (string, bool) {
	text, isText := scalar(e.value)
	switch {
	case isText && strings.TrimSpace(text) == "":
		r.fail(e.value, field, "it is empty", "Write a value, or remove the field")
		return "", false
	case isText && strings.ContainsFunc(text, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }):
		if _, literal := e.value.(*ast.LiteralNode); literal && !strings.ContainsAny(strings.TrimSpace(text), "\n\r") {
			return strings.TrimSpace(text), true
		}
		r.fail(e.value, field, "it must be one line", "Write it in one line, in quotes")
		return "", false
	case isText:
		return strings.TrimSpace(text), true
	}
	if e.value == nil || e.value.Type() == ast.NullType {
		r.fail(e.key, field, "it has no value", "Write a value after the colon, or remove the field")
		return "", false
	}
	if !r.special(e.value, field) {
		cure := "Write one value after the colon"
		if _, isList := e.value.(*ast.SequenceNode); isList {
			cure += "; put it in quotes if it begins with ["
		}
		r.fail(e.value, field, "it must be a text, not "+kind(e.value), cure)
	}
	return "", false
}

// list returns the texts of a list. check returns what is wrong with one.
func (r *reader) list(e entry, field string, check func(text string) (problem, cure string)) ([]string, []ast.Node) {
	sequence, isList := e.value.(*ast.SequenceNode)
	if !isList {
		if r.special(e.value, field) {
			return nil, nil
		}
		if e.value == nil || e.value.Type() == ast.NullType {
			r.fail(e.key, field, "it has no value", "Write a list, such as [one, two], or remove the field")
			return nil, nil
		}
		r.fail(e.value, field, "it must be a list, not "+kind(e.value), "Write [one, two], or one on each line after a dash")
		return nil, nil
	}
	var texts []string
	var nodes []ast.Node
	for _, value := range sequence.Values {
		at := entry{key: e.key, value: value}
		if value == nil {
			at.value = &ast.NullNode{BaseNode: &ast.BaseNode{}, Token: e.key.GetToken()}
		}
		text, good := r.text(at, field)
		if !good {
			continue
		}
		if slices.Contains(texts, text) {
			r.fail(value, field, quoted(text)+" is there twice", "Keep one")
			continue
		}
		if problem, cure := check(text); problem != "" {
			r.fail(value, field, quoted(text)+": "+problem, cure)
			continue
		}
		texts, nodes = append(texts, text), append(nodes, value)
	}
	return texts, nodes
}

func anyText(string) (string, string) { return "", "" }

func (r *reader) boolean(e entry, field string) (value, good bool) {
	if b, isBool := e.value.(*ast.BoolNode); isBool {
		return b.Value, true
	}
	if e.value != nil && r.special(e.value, field) {
		return false, false
	}
	r.fail(e.valueOrKey(), field, "it must be true or false, not "+kind(e.value), "Write true or false, without quotes")
	return false, false
}

func (e entry) valueOrKey() ast.Node {
	if e.value == nil || e.value.Type() == ast.NullType {
		return e.key
	}
	return e.value
}

// duration returns a duration of at least least.
func (r *reader) duration(e entry, field string, least time.Duration) (time.Duration, bool) {
	text, good := r.text(e, field)
	if !good {
		return 0, false
	}
	if _, err := strconv.ParseFloat(text, 64); err == nil {
		r.fail(e.value, field, quoted(text)+" has no unit", fmt.Sprintf("Write %ss for seconds, %sm for minutes or %sh for hours", text, text, text))
		return 0, false
	}
	d, err := time.ParseDuration(strings.ReplaceAll(text, " ", ""))
	switch {
	case err != nil:
		r.fail(e.value, field, quoted(text)+" is no duration", "Write it as 90s, 15m, 1h30m or 48h")
		return 0, false
	case d < least:
		r.fail(e.value, field, quoted(text)+" is too short", "The least is "+least.String())
		return 0, false
	case d > 10*365*24*time.Hour:
		r.fail(e.value, field, quoted(text)+" is too long", "The most is 87600h")
		return 0, false
	}
	return d, true
}

var units = []struct {
	name  string
	bytes float64
}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40}}

// size returns a number of bytes.
func (r *reader) size(e entry, field string) (int64, bool) {
	text, good := r.text(e, field)
	if !good {
		return 0, false
	}
	for _, unit := range units {
		number, has := strings.CutSuffix(text, unit.name)
		if !has {
			continue
		}
		value, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		if err != nil || math.IsNaN(value) || value <= 0 || value*unit.bytes < 1 || value*unit.bytes > 1<<50 {
			break
		}
		return int64(value * unit.bytes), true
	}
	cure := "Write it as 500KiB, 100MiB or 2GiB"
	if digits := strings.TrimRight(strings.ToLower(text), " kmgtib"); digits != strings.ToLower(text) && isNumber(digits) {
		rest := strings.ToLower(strings.TrimSpace(text[len(digits):]))
		for _, unit := range units {
			if rest != "" && rest[0] == strings.ToLower(unit.name)[0] {
				cure = fmt.Sprintf("Write %s%s", digits, unit.name)
			}
		}
	}
	r.fail(e.value, field, quoted(text)+" is no size", cure)
	return 0, false
}

func isNumber(text string) bool {
	return text != "" && strings.Trim(text, "0123456789.") == ""
}

// document reads the top of the file.
func (r *reader) document(node ast.Node) {
	for _, e := range r.fields(node, "", "") {
		switch e.name {
		case "services":
			for _, service := range r.entries(e.value, "services", "services by their names") {
				r.service(service)
			}
		case "redaction":
			r.redaction(e)
		}
	}
}

// service reads one service.
func (r *reader) service(e entry) {
	name := strings.ToLower(strings.TrimSpace(e.name))
	field := "services." + name
	if problem := badName(name); problem != "" {
		r.fail(e.key, "services", quoted(e.name)+" "+problem, "Write the target service of runs, such as api")
		return
	}
	have, isKnown := r.policy.Services[name]
	isKnown = isKnown && r.base != nil
	if have == nil {
		have = &Service{
			Name: name, ComposeService: name, ComposeProject: DefaultProject,
			Programs: []Program{{"docker"}, {"docker-compose"}, {"git"}}, Origins: map[string]Origin{},
		}
	}
	builtIn := have.clone()
	given := Service{Origins: map[string]Origin{}}
	listNodes := map[string][]ast.Node{}
	list := r.fields(e.value, field, "services.NAME")
	if len(list) == 0 && (e.value == nil || e.value.Type() == ast.NullType) {
		r.fail(e.key, field, "it has no fields", "Write what differs from the built-in policy, or remove the service")
		return
	}
	hasAllowList := false
	for _, f := range list {
		switch f.name {
		case "overrides":
			have.Overrides = r.overrides(f, field)
		case "enabled":
			if value, good := r.boolean(f, field+".enabled"); good {
				given.Disabled, given.Origins["enabled"] = !value, r.origin(f.key)
			}
		case "compose":
			r.compose(f, field+".compose", &given)
		case "allowList":
			hasAllowList = true
			given.AllowList, listNodes["allowList"] = r.allowList(f, field+".allowList", &given)
		case "programs":
			var names []string
			names, listNodes["programs"] = r.programs(f, field+".programs", &given)
			if isKnown {
				r.added(names, builtIn.ProgramNames(), listNodes["programs"], field, "programs")
			}
		default:
			r.shared(f, field, &given)
		}
	}
	switch {
	case isKnown:
		r.added(given.AllowList, builtIn.AllowList, listNodes["allowList"], field, "allowList")
	case !hasAllowList && !given.Disabled && isMapping(e.value):
		cure := "Add the globs of the files that its patches may change: allowList: [\"" + name + "/**\"]"
		if meant := nearest(name, slices.Sorted(maps.Keys(r.base))); meant != "" && meant != name {
			cure = "Did you mean " + meant + "? A service of your own needs the globs of the files that its patches may change"
		}
		r.fail(e.key, field, "allowList is missing", cure)
	}
	have.take(&given, false)
	r.policy.Services[name] = have
	r.checkAppCheck(e.key, field, have)
}

func isMapping(node ast.Node) bool {
	switch node.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return true
	}
	return false
}

// badName says why a text is no name of a service or project.
func badName(name string) string {
	if name == "" || strings.ContainsFunc(name, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("._-", c))
	}) || strings.ContainsAny(name[:1], ".-") || len(name) > 100 {
		return "is no name: it may have letters, digits, dots, dashes and underscores"
	}
	return ""
}

// added tells about entries of a list that a built-in service does not have.
func (r *reader) added(list, builtIn []string, nodes []ast.Node, field, name string) {
	for i, text := range list {
		if !slices.Contains(builtIn, text) {
			r.fail(nodes[i], field+"."+name, quoted(text)+" is more than the built-in service has, and needs a reason",
				fmt.Sprintf("Put it under %s.overrides: - {reason: why it is needed, %s: [%q]}", field, name, text))
		}
	}
}

func (r *reader) compose(e entry, field string, s *Service) {
	for _, f := range r.fields(e.value, field, "services.NAME.compose") {
		text, good := r.text(f, field+"."+f.name)
		if !good {
			continue
		}
		if problem := badName(text); problem != "" {
			r.fail(f.value, field+"."+f.name, quoted(text)+" "+problem, "Write the name that docker compose has")
			continue
		}
		s.Origins["compose."+f.name] = r.origin(f.key)
		switch f.name {
		case "service":
			s.ComposeService = text
		case "project":
			s.ComposeProject = text
		}
	}
}

func (r *reader) allowList(e entry, field string, s *Service) ([]string, []ast.Node) {
	globs, nodes := r.list(e, field, func(glob string) (string, string) {
		switch {
		case filepath.IsAbs(glob):
			return "it begins with a slash", "Write the path from the top of the workspace"
		case slices.Contains(strings.Split(glob, "/"), ".."):
			return "it has ..", "Runs can only change files of the workspace"
		}
		return "", ""
	})
	s.AllowList, s.Origins["allowList"] = globs, r.origin(e.key)
	return globs, nodes
}

func (r *reader) programs(e entry, field string, s *Service) ([]string, []ast.Node) {
	names, nodes := r.list(e, field, func(name string) (string, string) {
		switch {
		case strings.Contains(name, "/") && !filepath.IsAbs(name):
			return "it is neither a name nor an absolute path", "Write the name, or the path from /"
		case strings.ContainsAny(name, " \t"):
			return "it has a blank", "Write only the program; options are those of plans"
		}
		return "", ""
	})
	s.Origins["programs"] = r.origin(e.key)
	s.Programs = nil
	for _, name := range names {
		s.Programs = append(s.Programs, Program{name})
	}
	return names, nodes
}

// shared reads the fields that both a service and an override have.
func (r *reader) shared(f entry, field string, s *Service) {
	field += "." + f.name
	switch f.name {
	case "limits":
		for _, e := range r.fields(f.value, field, "services.NAME.limits") {
			r.limits(e, field+"."+e.name, s)
		}
	case "verify":
		for _, e := range r.fields(f.value, field, "services.NAME.verify") {
			r.verify(e, field+"."+e.name, s)
		}
	case "approval":
		for _, e := range r.fields(f.value, field, "services.NAME.approval") {
			if d, good := r.duration(e, field+"."+e.name, time.Second); good {
				s.ApprovalWait, s.Origins["approval.wait"] = d, r.origin(e.key)
			}
		}
	}
}

func (r *reader) limits(e entry, field string, s *Service) {
	path := "services.NAME.limits.STEP"
	if e.name == "run" {
		path = "services.NAME.limits.run"
	}
	step := e.name
	if step == everyStep {
		step = ""
	}
	limits := StepLimits{}
	for _, f := range r.fields(e.value, field, path) {
		var d time.Duration
		var n int64
		good := true
		text, _ := scalar(f.value)
		switch {
		case strings.TrimSpace(text) == "none":
			d, n = none, none
			if e.name == "run" || e.name == everyStep {
				d, n = 0, 0
			}
		case f.name == "time" || f.name == "idle":
			d, good = r.duration(f, field+"."+f.name, time.Second)
		default:
			n, good = r.size(f, field+"."+f.name)
		}
		if !good {
			continue
		}
		s.Origins["limits."+e.name+"."+f.name] = r.origin(f.key)
		switch f.name {
		case "time":
			limits.Time = d
		case "idle":
			limits.Idle = d
		case "output":
			limits.Output = n
		case "disk":
			limits.Disk = n
		}
	}
	if e.name == "run" {
		s.Limits.Run = RunLimits{limits.Time, limits.Output, limits.Disk}
		return
	}
	if s.Limits.Step == nil {
		s.Limits.Step = map[string]StepLimits{}
	}
	s.Limits.Step[step] = limits
}

func (r *reader) verify(e entry, field string, s *Service) {
	good := false
	switch e.name {
	case "quietPeriod":
		s.Verify.QuietPeriod, good = r.duration(e, field, 100*time.Millisecond)
	case "runningIsEnough":
		s.Verify.RunningIsEnough, good = r.boolean(e, field)
	case "healthURL":
		var text string
		if text, good = r.text(e, field); good {
			u, err := url.Parse(text)
			if good = err == nil && u.Host != "" && (u.Scheme == "http" || u.Scheme == "https"); !good {
				// The value may have a password.
				r.fail(e.value, field, "it is no URL that verify can ask", "Write http://host:port/path")
			}
			s.Verify.HealthURL = text
		}
	case "appCheck":
		if sequence, isList := e.value.(*ast.SequenceNode); isList && len(sequence.Values) == 0 {
			r.fail(e.value, field, "the command is empty", "Write the program and its arguments, or remove the field")
			return
		}
		s.Verify.AppCheck, good = r.words(e, field)
	}
	if good {
		s.Origins["verify."+e.name] = r.origin(e.key)
	}
}

// words reads a command line. Unlike in other lists, words may be there twice.
func (r *reader) words(e entry, field string) ([]string, bool) {
	sequence, isList := e.value.(*ast.SequenceNode)
	if !isList {
		r.list(e, field, anyText)
		return nil, false
	}
	var words []string
	before := len(r.errs)
	for _, value := range sequence.Values {
		if text, good := r.text(entry{key: e.key, value: value}, field); good {
			words = append(words, text)
		}
	}
	return words, len(r.errs) == before
}

// checkAppCheck tells about an application check that could never run.
func (r *reader) checkAppCheck(node ast.Node, field string, s *Service) {
	if len(s.Verify.AppCheck) == 0 || !s.Origins["verify.appCheck"].IsFile() {
		return
	}
	names := s.ProgramNames()
	for _, o := range s.Overrides {
		for _, p := range o.Programs() {
			names = append(names, p.Name)
		}
	}
	// Without programs in the file, a setting may add some.
	if s.Origins["programs"].IsFile() && !slices.Contains(names, s.Verify.AppCheck[0]) {
		r.fail(node, field+".verify.appCheck", quoted(s.Verify.AppCheck[0])+" is no program that plans may start", "Use one of "+strings.Join(names, ", ")+", or add it under overrides")
	}
}

// overrides reads the overrides of a service.
func (r *reader) overrides(e entry, field string) []Override {
	field += ".overrides"
	sequence, isList := e.value.(*ast.SequenceNode)
	if !isList {
		if e.value == nil || !r.special(e.value, field) {
			r.fail(e.valueOrKey(), field, "it must be a list, not "+kind(e.value), "Begin each override with a dash: - reason: …")
		}
		return nil
	}
	var list []Override
	for i, value := range sequence.Values {
		at := fmt.Sprintf("%s[%d]", field, i+1)
		node := value
		if value == nil || value.Type() == ast.NullType {
			node = e.key
		}
		list = append(list, r.override(node, value, at))
	}
	return list
}

func (r *reader) override(node, value ast.Node, field string) Override {
	o := Override{Origin: r.origin(node), values: Service{Origins: map[string]Origin{}}}
	before := len(r.errs)
	has := map[string]bool{}
	for _, f := range r.fields(value, field, "services.NAME.overrides") {
		has[f.name] = true
		at := field + "." + f.name
		switch f.name {
		case "reason":
			o.Reason, _ = r.text(f, at)
		case "until":
			o.Until = r.moment(f, at)
		case "allowList":
			r.allowList(f, at, &o.values)
		case "programs":
			r.programs(f, at, &o.values)
		case "command":
			var good bool
			if o.Command, good = r.text(f, at); good && !judged(o.Command) {
				r.fail(f.value, at, quoted(o.Command)+" is no command with rules", "Write git, docker, docker-compose, or one of them with a subcommand, such as docker build. Other programs belong under programs")
			}
		case "options":
			o.Options, _ = r.list(f, at, anyText)
		case "directories":
			o.Directories, _ = r.list(f, at, func(path string) (string, string) {
				if !filepath.IsAbs(path) {
					return "it is no absolute path", "Write the path from /"
				}
				return "", ""
			})
		default:
			r.shared(f, field, &o.values)
		}
	}
	switch {
	case !has["reason"]:
		r.fail(node, field, "reason is missing", "Say why this service needs an exception: reason: a sentence or a ticket")
	case (has["options"] || has["directories"]) && !has["command"]:
		r.fail(node, field, "options and directories need a command", "Add the command that they belong to, such as command: docker build")
	case len(o.Fields()) == 0 && len(r.errs) == before:
		r.fail(node, field, "it changes nothing", "Add what it allows: "+oneOf([]string{"allowList", "programs", "command", "limits", "verify"}))
	}
	return o
}

// judged says that a command begins with a program whose command lines have rules.
func judged(command string) bool {
	first, _, _ := strings.Cut(command, " ")
	return slices.Contains([]string{"git", "docker", "docker-compose"}, first)
}

// moment reads a day, whose end counts, or a time.
func (r *reader) moment(e entry, field string) time.Time {
	text, good := r.text(e, field)
	if !good {
		return time.Time{}
	}
	if day, err := time.Parse(time.DateOnly, text); err == nil {
		return day.AddDate(0, 0, 1)
	}
	if at, err := time.Parse(time.RFC3339, text); err == nil {
		return at
	}
	r.fail(e.value, field, quoted(text)+" is no day", "Write it as 2027-01-31 (to the end of that day, UTC) or as 2027-01-31T06:00:00Z")
	return time.Time{}
}

func (r *reader) redaction(e entry) {
	to := &r.policy.Redaction
	to.Origins = map[string]Origin{}
	for _, f := range r.fields(e.value, "redaction", "redaction") {
		field := "redaction." + f.name
		to.Origins[f.name] = r.origin(f.key)
		switch f.name {
		case "commonWords":
			text, good := r.text(f, field)
			if good && text != GuardCommonWords && text != MaskCommonWords {
				cure := "Write guard or mask"
				if meant := nearest(text, []string{GuardCommonWords, MaskCommonWords}); meant != "" {
					cure = "Did you mean " + meant + "? " + cure
				}
				r.fail(f.value, field, quoted(text)+" is not known", cure)
			}
			to.CommonWords = text
		case "words":
			to.Words, _ = r.list(f, field, anyText)
		case "add":
			to.Add, _ = r.list(f, field, func(name string) (string, string) {
				if strings.ContainsAny(name, "= \t$") {
					return "it is no name of a variable", "Write only the name: the value stays out of this file"
				}
				return "", ""
			})
		}
	}
}
