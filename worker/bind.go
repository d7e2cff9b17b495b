package worker

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Bind decodes a task's arguments into the struct that in points to, as
// Python binds arguments to the parameters of a function. name is the task's
// name; error texts contain it.
//
// Each exported field is a parameter, in the order of the fields. Its tag names
// it:
//
//	X     int    `celery:"x"`           // required
//	Y     *int   `celery:"y"`           // optional: nil when absent or None
//	Z     string `celery:"z,optional"`  // optional: unchanged when absent
//	Rest  []any  `celery:"*"`           // further positional arguments, never nil
//	Key   string `celery:"key"`         // keyword-only, since it comes after "*"
//	Extra map[string]any `celery:"**"`  // further keyword arguments, never nil
//	Own   int    `celery:"-"`           // not a parameter
//
// Values are decoded by [protocol.DecodeJSON]: Python's type wrappers become
// time.Time, []byte, [protocol.Decimal] and the like, and a json.RawMessage
// receives the text as the producer sent it. A value that does not fit its field
// is an error, never changed: see docs/library.md#types. None fits a pointer, an
// any, a slice and a map.
//
// For wrong arguments Bind returns an [Error] of class TypeError with the text
// that Python has for it. It panics when In is not a struct, has an exported
// field without a tag, has two fields for one parameter, or embeds a struct with
// tagged fields: that is an error in the program.
func Bind[In any](name string, in *In, args []json.RawMessage, kwargs protocol.Object) error {
	return newBinder[In](name).into(in, args, kwargs)
}

// binder describes the parameters of one argument type.
type binder[In any] struct {
	function   string // its name in Python's error texts
	parameters []parameter
	positional int // how many of the parameters may be given by position
	rest       int // index of the field for *args, or -1
	extra      int // index of the field for **kwargs, or -1
}

type parameter struct {
	name     string
	field    int
	optional bool
}

func newBinder[In any](name string) *binder[In] {
	b := &binder[In]{positional: -1, function: name[strings.LastIndexByte(name, '.')+1:] + "()", rest: -1, extra: -1}
	t := reflect.TypeFor[In]()
	if t.Kind() != reflect.Struct {
		panic(fmt.Sprintf("worker: task %q: arguments must be a struct, not %v", name, t))
	}
	for i := range t.NumField() {
		f := t.Field(i)
		tag, tagged := f.Tag.Lookup("celery")
		if !tagged && hasParameters(f) {
			panic(fmt.Sprintf("worker: task %q: the fields of the embedded struct %s are no parameters: write them out, or tag it `celery:\"-\"`", name, f.Name))
		}
		if tag == "-" || !f.IsExported() && !tagged {
			continue
		}
		parameter := parameter{field: i, optional: f.Type.Kind() == reflect.Pointer}
		parameter.name, tag, _ = strings.Cut(tag, ",")
		switch {
		case !f.IsExported() || parameter.name == "":
			panic(fmt.Sprintf("worker: task %q: field %s needs an exported name and a tag such as `celery:\"%s\"`, or `celery:\"-\"`", name, f.Name, strings.ToLower(f.Name)))
		case b.has(parameter.name):
			panic(fmt.Sprintf("worker: task %q: field %s has the tag %q of another field", name, f.Name, parameter.name))
		case parameter.name == "*" && f.Type.Kind() == reflect.Slice:
			b.rest, b.positional = i, len(b.parameters)
			continue
		case parameter.name == "**" && f.Type.Kind() == reflect.Map && f.Type.Key().Kind() == reflect.String:
			b.extra = i
			continue
		case parameter.name == "*" || parameter.name == "**":
			panic(fmt.Sprintf("worker: task %q: field %s must be a slice for \"*\", or a map with string keys for \"**\"", name, f.Name))
		case tag == "optional":
			parameter.optional = true
		case tag != "":
			panic(fmt.Sprintf("worker: task %q: field %s has the unknown tag option %q", name, f.Name, tag))
		}
		b.parameters = append(b.parameters, parameter)
	}
	if b.rest < 0 {
		b.positional = len(b.parameters)
	}
	return b
}

// hasParameters reports whether a field is an embedded struct with tagged fields, which
// package encoding/json would take for fields of the outer struct.
func hasParameters(f reflect.StructField) bool {
	t := f.Type
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if !f.Anonymous || t.Kind() != reflect.Struct {
		return false
	}
	for i := range t.NumField() {
		if tag, tagged := t.Field(i).Tag.Lookup("celery"); tagged && tag != "-" {
			return true
		}
	}
	return false
}

func (b *binder[In]) positionalNames() []string {
	names := make([]string, b.positional)
	for i, p := range b.parameters[:b.positional] {
		names[i] = p.name
	}
	return names
}

func (b *binder[In]) has(name string) bool {
	switch name {
	case "*":
		return b.rest >= 0
	case "**":
		return b.extra >= 0
	}
	return b.index(name) >= 0
}

// into decodes the arguments. It checks in the order in which CPython does
// (keyword arguments, too many positional ones, missing ones), so that the same
// mistake gives the same text, and then decodes the values.
func (b *binder[In]) into(in *In, args []json.RawMessage, kwargs protocol.Object) error {
	texts := make([]json.RawMessage, len(b.parameters))
	named := min(len(args), b.positional)
	copy(texts, args[:named])
	target := reflect.ValueOf(in).Elem()

	var extra protocol.Object
	for _, member := range kwargs {
		i := b.index(member.Key)
		switch {
		case i < 0 && b.extra < 0:
			return b.typeError("got an unexpected keyword argument '%s'", member.Key)
		case i < 0:
			extra = append(extra, member)
		case texts[i] != nil:
			return b.typeError("got multiple values for argument '%s'", member.Key)
		default:
			texts[i] = member.Value
		}
	}
	if len(args) > named && b.rest < 0 {
		return b.tooMany(len(args))
	}
	if err := b.missing("positional", b.parameters[:b.positional], texts); err != nil {
		return err
	}
	if err := b.missing("keyword-only", b.parameters[b.positional:], texts[b.positional:]); err != nil {
		return err
	}
	for i, p := range b.parameters {
		if texts[i] == nil {
			continue
		}
		if err := b.decode(p.name, texts[i], target.Field(p.field)); err != nil {
			return err
		}
	}
	if b.rest >= 0 {
		field := target.Field(b.rest)
		field.Set(reflect.MakeSlice(field.Type(), 0, len(args)-named))
		for i, text := range args[named:] {
			element := reflect.New(field.Type().Elem()).Elem()
			if err := b.decode(fmt.Sprintf("*args[%d]", i), text, element); err != nil {
				return err
			}
			field.Set(reflect.Append(field, element))
		}
	}
	if b.extra >= 0 {
		field := target.Field(b.extra)
		field.Set(reflect.MakeMapWithSize(field.Type(), len(extra)))
		for _, member := range extra {
			element := reflect.New(field.Type().Elem()).Elem()
			if err := b.decode(member.Key, member.Value, element); err != nil {
				return err
			}
			field.SetMapIndex(reflect.ValueOf(member.Key).Convert(field.Type().Key()), element)
		}
	}
	return nil
}

func (b *binder[In]) decode(name string, text json.RawMessage, field reflect.Value) error {
	if err := protocol.DecodeJSON(text, field.Addr().Interface()); err != nil {
		return b.typeError("argument '%s': %v", name, err)
	}
	return nil
}

func (b *binder[In]) index(name string) int {
	for i, p := range b.parameters {
		if p.name == name {
			return i
		}
	}
	return -1
}

func (b *binder[In]) typeError(format string, args ...any) error {
	return &Error{Type: "TypeError", Args: []any{b.function + " " + fmt.Sprintf(format, args...)}, wrongArguments: true}
}

func (b *binder[In]) tooMany(given int) error {
	most, required := len(b.parameters), 0
	for _, p := range b.parameters {
		if !p.optional {
			required++
		}
	}
	takes, plural := fmt.Sprint(most), most != 1
	if required < most {
		takes, plural = fmt.Sprintf("from %d to %d", required, most), true
	}
	argument, were := "argument", "were"
	if plural {
		argument = "arguments"
	}
	if given == 1 {
		were = "was"
	}
	return b.typeError("takes %s positional %s but %d %s given", takes, argument, given, were)
}

// missing returns the error for required parameters without a text. kind is
// Python's word for these parameters.
func (b *binder[In]) missing(kind string, parameters []parameter, texts []json.RawMessage) error {
	var names []string
	for i, p := range parameters {
		if texts[i] == nil && !p.optional {
			names = append(names, "'"+p.name+"'")
		}
	}
	var list string
	argument := "arguments"
	switch n := len(names); n {
	case 0:
		return nil
	case 1:
		list, argument = names[0], "argument"
	case 2:
		list = names[0] + " and " + names[1]
	default:
		list = strings.Join(names[:n-1], ", ") + ", and " + names[n-1]
	}
	return b.typeError("missing %d required %s %s: %s", len(names), kind, argument, list)
}
