package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
)

// difference is one place where two JSON documents differ.
type difference struct {
	// Path is the place: keys and indices, joined by dots.
	Path string
	// Want and Got are nil if that document has no value at this place; JSON
	// null is the value null.
	Want, Got any
}

// null is JSON null, as opposed to a missing value.
type null struct{}

func (null) String() string { return "null" }

func (d difference) String() string {
	return fmt.Sprintf("%s: want %s, got %s", d.Path, show(d.Want), show(d.Got))
}

func show(value any) string {
	switch value.(type) {
	case nil:
		return "nothing"
	case null:
		return "null"
	}
	text, err := json.Marshal(value)
	if err != nil {
		return fmt.Sprint(value)
	}
	return string(text)
}

// differences compares two plain JSON values leaf by leaf.
func differences(want, got any) []difference {
	a, b := make(map[string]any), make(map[string]any)
	flatten("", want, a)
	flatten("", got, b)
	paths := slices.Sorted(maps.Keys(a))
	for path := range b {
		if _, ok := a[path]; !ok {
			paths = append(paths, path)
		}
	}
	slices.Sort(paths)
	var found []difference
	for _, path := range paths {
		if !reflect.DeepEqual(a[path], b[path]) {
			found = append(found, difference{path, a[path], b[path]})
		}
	}
	return found
}

func flatten(path string, value any, into map[string]any) {
	join := func(key string) string {
		if path == "" {
			return key
		}
		return path + "." + key
	}
	switch value := value.(type) {
	case map[string]any:
		if len(value) == 0 {
			into[path] = map[string]any{}
		}
		for key, member := range value {
			flatten(join(key), member, into)
		}
	case []any:
		if len(value) == 0 {
			into[path] = []any{}
		}
		for i, element := range value {
			flatten(join(fmt.Sprint(i)), element, into)
		}
	case nil:
		into[path] = null{}
	default:
		into[path] = value
	}
}
