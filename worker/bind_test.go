package worker_test

import (
	"encoding/json"
	"math/big"
	"reflect"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

func TestArgumentsBindAsInPython(t *testing.T) {
	t.Parallel()
	type two struct {
		X int `celery:"x"`
		Y int `celery:"y"`
	}
	type defaults struct {
		X int    `celery:"x"`
		Y *int   `celery:"y"`
		Z string `celery:"z,optional"`
	}
	type three struct {
		A int `celery:"a"`
		B int `celery:"b"`
		C int `celery:"c"`
	}
	type one struct {
		X int `celery:"x"`
	}
	type keywordOnly struct {
		A     int            `celery:"a"`
		Rest  []int          `celery:"*"`
		B     int            `celery:"b"`
		C     int            `celery:"c"`
		D     *int           `celery:"d"`
		Extra map[string]any `celery:"**"`
	}
	type all struct {
		First string         `celery:"first"`
		Rest  []int          `celery:"*"`
		Extra map[string]any `celery:"**"`
		Own   int            `celery:"-"`
	}
	seven := 7
	kwargs := workertest.Kwargs
	for _, c := range []struct {
		name   string
		args   []json.RawMessage
		kwargs protocol.Object
		bind   func(args []json.RawMessage, kwargs protocol.Object) (any, error)
		want   any // the struct, or the text of the TypeError as a string
	}{
		// The texts are CPython 3.11's.
		{"positional", workertest.Args(2, 3), nil, bindTo[two], two{2, 3}},
		{"keywords", nil, kwargs(map[string]any{"y": 3, "x": 2}), bindTo[two], two{2, 3}},
		{"mixed", workertest.Args(2), kwargs(map[string]any{"y": 3}), bindTo[two], two{2, 3}},
		{"defaults", workertest.Args(1), nil, bindTo[defaults], defaults{X: 1, Z: "unchanged"}},
		{"optional given", workertest.Args(1, 7, "z"), nil, bindTo[defaults], defaults{1, &seven, "z"}},
		{"None for a pointer", workertest.Args(1, nil), nil, bindTo[defaults], defaults{X: 1, Z: "unchanged"}},
		{"rest and extra", workertest.Args("a", 1, 2), kwargs(map[string]any{"k": "v"}), bindTo[all], all{First: "a", Rest: []int{1, 2}, Extra: map[string]any{"k": "v"}}},
		{"one missing", workertest.Args(1), nil, bindTo[two], "add() missing 1 required positional argument: 'y'"},
		{"two missing", nil, nil, bindTo[two], "add() missing 2 required positional arguments: 'x' and 'y'"},
		{"three missing", nil, nil, bindTo[three], "add() missing 3 required positional arguments: 'a', 'b', and 'c'"},
		{"too many", workertest.Args(1, 2, 3), nil, bindTo[two], "add() takes 2 positional arguments but 3 were given"},
		{"too many for one", workertest.Args(1, 2), nil, bindTo[one], "add() takes 1 positional argument but 2 were given"},
		{"too many for none", workertest.Args(1), nil, bindTo[struct{}], "add() takes 0 positional arguments but 1 was given"},
		{"too many with defaults", workertest.Args(1, 2, "3", 4), nil, bindTo[defaults], "add() takes from 1 to 3 positional arguments but 4 were given"},
		{"unexpected", workertest.Args(1, 2), kwargs(map[string]any{"z": 1}), bindTo[two], "add() got an unexpected keyword argument 'z'"},
		{"twice", workertest.Args(1, 2), kwargs(map[string]any{"x": 1}), bindTo[two], "add() got multiple values for argument 'x'"},
		{"keyword-only", workertest.Args(1, 2, 3, 4), kwargs(map[string]any{"b": 5, "c": 6, "e": "f"}), bindTo[keywordOnly],
			keywordOnly{A: 1, Rest: []int{2, 3, 4}, B: 5, C: 6, Extra: map[string]any{"e": "f"}}},
		{"keyword-only missing", workertest.Args(1, 2, 3), kwargs(map[string]any{"c": 6}), bindTo[keywordOnly], "add() missing 1 required keyword-only argument: 'b'"},
		{"all keyword-only missing", workertest.Args(1, 2, 3), nil, bindTo[keywordOnly], "add() missing 2 required keyword-only arguments: 'b' and 'c'"},
		{"positional missing first", nil, nil, bindTo[keywordOnly], "add() missing 1 required positional argument: 'a'"},
		{"keyword-only twice", workertest.Args(1), kwargs(map[string]any{"a": 1}), bindTo[keywordOnly], "add() got multiple values for argument 'a'"},
		{"wrong type", workertest.Args("a", 2), nil, bindTo[two], ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := c.bind(c.args, c.kwargs)
			text, fails := c.want.(string)
			if !fails {
				if err != nil || !reflect.DeepEqual(got, c.want) {
					t.Errorf("got %+v, %v, want %+v", got, err, c.want)
				}
				return
			}
			if err == nil || text != "" && err.Error() != "TypeError: "+text {
				t.Errorf("got %v, want %s", err, text)
			}
		})
	}
}

// A handler that returns its "*" and "**" returns [] and {} where Python does.
func TestRestFieldsAreNeverNil(t *testing.T) {
	t.Parallel()
	type rest struct {
		Args   []any          `celery:"*"`
		Kwargs map[string]any `celery:"**"`
	}
	got, err := bindTo[rest](nil, nil)
	if want := (rest{[]any{}, map[string]any{}}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %#v, %v", got, err)
	}
}

func bindTo[T any](args []json.RawMessage, kwargs protocol.Object) (any, error) {
	var in T
	if f := reflect.ValueOf(&in).Elem(); f.NumField() > 2 && f.Type().Field(2).Name == "Z" {
		f.Field(2).SetString("unchanged")
	}
	err := worker.Bind("shop.add", &in, args, kwargs)
	return in, err
}

func TestPythonValuesAreDecodedWithoutLoss(t *testing.T) {
	t.Parallel()
	type values struct {
		When   time.Time        `celery:"when"`
		Data   []byte           `celery:"data"`
		Big    *big.Int         `celery:"big"`
		Amount protocol.Decimal `celery:"amount"`
		Text   json.RawMessage  `celery:"text"`
	}
	var in values
	err := worker.Bind("shop.values", &in, []json.RawMessage{
		[]byte(`{"__type__": "datetime", "__value__": "2024-05-06T07:08:09.123456+00:00"}`),
		[]byte(`{"__type__": "base64", "__value__": "//4="}`),
		[]byte(`123456789012345678901234567890`),
		[]byte(`{"__type__": "decimal", "__value__": "12.340"}`),
		[]byte(`[NaN, 1e400]`),
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !in.When.Equal(time.Date(2024, 5, 6, 7, 8, 9, 123456000, time.UTC)) || string(in.Data) != "\xff\xfe" ||
		in.Big.String() != "123456789012345678901234567890" || in.Amount != "12.340" || string(in.Text) != "[NaN, 1e400]" {
		t.Errorf("got %+v", in)
	}
}

func TestProgrammingErrorsPanic(t *testing.T) {
	t.Parallel()
	type common struct {
		Tenant string `celery:"tenant"`
	}
	for name, register := range map[string]func(w *worker.Worker){
		"no struct": func(w *worker.Worker) { w.Register("a", worker.Typed[int, any]("a", nil)) },
		"no tag":    func(w *worker.Worker) { w.Register("a", worker.Typed[struct{ X int }, any]("a", nil)) },
		"bad option": func(w *worker.Worker) {
			w.Register("a", worker.Typed[struct {
				X int `celery:"x,omitempty"`
			}, any]("a", nil))
		},
		"two fields of one name": func(w *worker.Worker) {
			w.Register("a", worker.Typed[struct {
				X int `celery:"x"`
				Y int `celery:"x"`
			}, any]("a", nil))
		},
		"two fields for the rest": func(w *worker.Worker) {
			w.Register("a", worker.Typed[struct {
				X []int `celery:"*"`
				Y []int `celery:"*"`
			}, any]("a", nil))
		},
		"an embedded struct": func(w *worker.Worker) {
			w.Register("a", worker.Typed[struct {
				common
				X int `celery:"x"`
			}, any]("a", nil))
		},
		"twice": func(w *worker.Worker) { w.Register("a", newGatedTask()); w.Register("a", newGatedTask()) },
		"nil":   func(w *worker.Worker) { w.Register("a", nil) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			register(newWorker(t, worker.Config{Broker: "amqp://localhost", Queues: []string{"q"}}))
		})
	}
}
