package protocol

import (
	"reflect"
	"slices"
	"strings"
	"sync"
)

// field is a struct field as encoding/json sees it.
type field struct {
	name      string
	index     []int
	tagged    bool
	omitEmpty bool
	omitZero  bool
	// quoted is the option ",string" on a number or bool.
	quoted bool
}

func (f field) omit(v reflect.Value) bool {
	if f.omitZero {
		if z, ok := v.Interface().(interface{ IsZero() bool }); ok && z.IsZero() || v.IsZero() {
			return true
		}
	}
	if !f.omitEmpty {
		return false
	}
	switch v.Kind() {
	case reflect.Array, reflect.Map, reflect.Slice, reflect.String:
		return v.Len() == 0
	case reflect.Struct:
		return false
	}
	return v.IsZero()
}

// fieldCache maps a struct type to its fields. It is never emptied: a program
// has few such types.
var fieldCache sync.Map

// fieldsOf lists the fields of a struct that are encoded, in the order of the
// source. As in encoding/json, of several fields with one name the least nested
// one is used, then the one with a tag, and otherwise none.
func fieldsOf(t reflect.Type) []field {
	if cached, ok := fieldCache.Load(t); ok {
		return cached.([]field)
	}
	byName := map[string][]field{}
	var names []string
	collectFields(t, nil, map[reflect.Type]bool{}, func(f field) {
		if byName[f.name] == nil {
			names = append(names, f.name)
		}
		byName[f.name] = append(byName[f.name], f)
	})
	var out []field
	for _, name := range names {
		if f, ok := dominant(byName[name]); ok {
			out = append(out, f)
		}
	}
	slices.SortFunc(out, func(a, b field) int { return slices.Compare(a.index, b.index) })
	fieldCache.Store(t, out)
	return out
}

func dominant(fields []field) (field, bool) {
	slices.SortStableFunc(fields, func(a, b field) int {
		if d := len(a.index) - len(b.index); d != 0 {
			return d
		}
		switch {
		case a.tagged && !b.tagged:
			return -1
		case !a.tagged && b.tagged:
			return 1
		}
		return 0
	})
	first := fields[0]
	if len(fields) > 1 && len(fields[1].index) == len(first.index) && fields[1].tagged == first.tagged {
		return field{}, false
	}
	return first, true
}

func collectFields(t reflect.Type, index []int, seen map[reflect.Type]bool, add func(field)) {
	if seen[t] {
		return
	}
	seen[t] = true
	defer delete(seen, t)
	for i := range t.NumField() {
		sf := t.Field(i)
		tag := sf.Tag.Get("json")
		if tag == "-" {
			continue
		}
		name, options, _ := strings.Cut(tag, ",")
		inner := sf.Type
		if inner.Kind() == reflect.Pointer {
			inner = inner.Elem()
		}
		at := append(slices.Clone(index), i)
		if sf.Anonymous && name == "" && inner.Kind() == reflect.Struct {
			collectFields(inner, at, seen, add)
			continue
		}
		if !sf.IsExported() {
			continue
		}
		f := field{name: name, index: at, tagged: name != ""}
		if name == "" {
			f.name = sf.Name
		}
		for option := range strings.SplitSeq(options, ",") {
			switch option {
			case "omitempty":
				f.omitEmpty = true
			case "omitzero":
				f.omitZero = true
			case "string":
				switch inner.Kind() {
				case reflect.Bool, reflect.String, reflect.Float32, reflect.Float64:
					f.quoted = true
				default:
					f.quoted = inner.Kind() >= reflect.Int && inner.Kind() <= reflect.Uintptr
				}
			}
		}
		add(f)
	}
}
