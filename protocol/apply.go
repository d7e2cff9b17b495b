package protocol

import (
	"bytes"
	"cmp"
	"compress/zlib"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"time"
)

// Apply makes the message that runs the signature
// (docs/celery.md#applying-a-signature): it merges the arguments and maps the
// options to headers, properties and embed. It leaves Exchange and RoutingKey
// empty; the worker's routes choose them from the Destination.
//
// The body is always JSON. The option compression is obeyed for zlib (which
// Celery also calls gzip). With any other compression the body is sent
// uncompressed and without the compression header, which every reader accepts;
// Go's standard library cannot write those formats.
//
// The error is a [*MalformedError] with [ReasonOptions]: the option serializer
// is not json, or an option has the wrong type.
func (s Signature) Apply(o ApplyOptions) (Publishing, Destination, error) {
	if o.NewID == nil {
		o.NewID = newUUID
	}
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	a := application{s: s, o: o}
	p, err := a.publishing()
	if err != nil {
		return Publishing{}, Destination{}, &MalformedError{
			Reason: ReasonOptions, Task: s.Task, TaskID: p.TaskID, Detail: err.Error()}
	}
	return p, s.Destination(), nil
}

// An application is one call of [Signature.Apply].
type application struct {
	s Signature
	o ApplyOptions
}

func (a *application) option(name string) json.RawMessage { return a.s.Option(name) }

// optionError names the option that is wrong, with its value.
func (a *application) optionError(name, why string) error {
	return fmt.Errorf("option %s is %s: %s", name, truncate(string(a.option(name)), 60), why)
}

func (a *application) publishing() (Publishing, error) {
	id := a.s.TaskID()
	if id == "" {
		id = a.o.NewID()
	}
	p := Publishing{TaskID: id, Task: a.s.Task}
	if serializer := a.option("serializer"); serializer != nil && textOf(serializer) != "json" {
		return p, a.optionError("serializer", "only json can be written")
	}
	args, rawArgs, tuple := a.arguments()
	var prepared Prepared
	if a.o.Prepare != nil {
		var err error
		if prepared, err = a.o.Prepare(a.s, args); err != nil {
			return p, err
		}
		args, rawArgs = prepared.Args, joinArray(prepared.Args)
	}
	chain := a.o.Chain
	if text := a.option("chain"); chain == nil && text != nil {
		var err error
		if chain, err = parseSignatures(text); err != nil {
			return p, a.optionError("chain", detailOf(err))
		}
	}
	embed, err := a.embed(chain)
	if err != nil {
		return p, err
	}
	p.Body = messageBody(rawArgs, a.s.rawKwargs, embed)
	if p.Properties, err = a.properties(id); err != nil {
		return p, err
	}
	p.Headers, err = a.headers(id, args, tuple)
	if err != nil {
		return p, err
	}
	for name, value := range prepared.Headers {
		if _, own := p.Headers[name]; !own {
			p.Headers[name] = value
		}
	}
	if expires, err := a.moment("expires"); err != nil {
		return p, err
	} else if expires.text != "" {
		p.Headers["expires"] = expires.text
		p.Properties.Expiration = expiration(expires.at, a.o.Now)
	}
	return p, a.compress(&p)
}

// arguments merges the parent's arguments with the signature's. tuple says
// whether argsrepr shows them as a tuple: Celery does for merged arguments and
// for members of a group.
func (a *application) arguments() (args []json.RawMessage, raw json.RawMessage, tuple bool) {
	if a.s.Immutable || len(a.o.Args) == 0 {
		return a.s.Args, a.s.rawArgs, a.o.Group != ""
	}
	args = append(append([]json.RawMessage{}, a.o.Args...), a.s.Args...)
	return args, joinArray(args), true
}

// messageBody writes [args, kwargs, embed].
func messageBody(args, kwargs, embed json.RawMessage) []byte {
	return joinArray([]json.RawMessage{args, kwargs, embed})
}

// embedJSON writes the third element of a body.
func embedJSON(callbacks, errbacks, chain, chord json.RawMessage) json.RawMessage {
	null := func(text json.RawMessage) json.RawMessage {
		if text == nil {
			return json.RawMessage("null")
		}
		return text
	}
	return joinObject(Object{
		{"callbacks", null(callbacks)},
		{"errbacks", null(errbacks)},
		{"chain", null(chain)},
		{"chord", null(chord)},
	})
}

func (a *application) embed(chain []Signature) (json.RawMessage, error) {
	callbacks, err := a.signatureList("link")
	if err != nil {
		return nil, err
	}
	errbacks, err := a.signatureList("link_error")
	if err != nil {
		return nil, err
	}
	return embedJSON(callbacks, errbacks, signaturesJSON(chain), a.option("chord")), nil
}

// signatureList returns an option as an array of signatures. The option may be
// such an array or a single signature.
func (a *application) signatureList(name string) (json.RawMessage, error) {
	text := a.option(name)
	if text == nil {
		return nil, nil
	}
	if _, err := parseSignatures(text); err != nil {
		return nil, a.optionError(name, detailOf(err))
	}
	if kindOf(text) == kindObject {
		return joinArray([]json.RawMessage{text}), nil
	}
	return text, nil
}

// signaturesJSON writes signatures with their text unchanged; nil stays nil.
func signaturesJSON(sigs []Signature) json.RawMessage {
	if sigs == nil {
		return nil
	}
	texts := make([]json.RawMessage, len(sigs))
	for i, s := range sigs {
		texts[i] = s.raw
	}
	return joinArray(texts)
}

func (a *application) properties(id string) (Properties, error) {
	p := Properties{
		ContentType:     contentTypeJSON,
		ContentEncoding: "utf-8",
		DeliveryMode:    2,
		CorrelationID:   id,
		ReplyTo:         a.o.ReplyTo,
	}
	if text := textOf(a.option("reply_to")); text != "" {
		p.ReplyTo = text
	}
	switch text := a.option("priority"); {
	case text != nil:
		n, ok := intField(plainValue(text))
		if !ok || n < 0 || n > math.MaxUint8 {
			return p, a.optionError("priority", "it must be an integer from 0 to 255")
		}
		priority := uint8(n)
		p.Priority = &priority
	case a.o.Priority != nil:
		p.Priority = a.o.Priority
	default:
		p.Priority = new(uint8)
	}
	switch mode := plainValue(a.optionOr("delivery_mode", "2")); mode {
	case int32(1), "transient":
		p.DeliveryMode = 1
	}
	return p, nil
}

// optionOr returns an option, or otherwise when it is absent or null.
func (a *application) optionOr(name, otherwise string) json.RawMessage {
	if text := a.option(name); text != nil {
		return text
	}
	return json.RawMessage(otherwise)
}

// headers writes all headers of docs/celery.md#headers, with the keys and
// values that a Python worker writes. The exception is ignore_result, which is
// null: the task's own setting then decides, and a sender in Go does not know
// that setting.
func (a *application) headers(id string, args []json.RawMessage, tuple bool) (map[string]any, error) {
	eta, err := a.eta()
	if err != nil {
		return nil, err
	}
	group := textOf(a.option("group_id"))
	if group == "" {
		group = a.o.Group
	}
	index := plainValue(a.optionOr("group_index", "null"))
	if a.o.GroupIndex != nil {
		index = int32(*a.o.GroupIndex)
	}
	stamped, stamps := a.stamps()
	headers := map[string]any{
		"lang":                  "py",
		"task":                  a.s.Task,
		"id":                    id,
		"shadow":                orNil(textOf(a.option("shadow"))),
		"eta":                   orNil(eta),
		"expires":               nil,
		"group":                 orNil(group),
		"group_index":           index,
		"retries":               plainValue(a.optionOr("retries", "0")),
		"timelimit":             []any{plainValue(a.optionOr("time_limit", "null")), plainValue(a.optionOr("soft_time_limit", "null"))},
		"root_id":               cmp.Or(a.o.RootID, textOf(a.option("root_id")), id),
		"parent_id":             orNil(cmp.Or(a.o.ParentID, textOf(a.option("parent_id")))),
		"argsrepr":              cmp.Or(textOf(a.option("argsrepr")), argsRepr(args, tuple)),
		"kwargsrepr":            cmp.Or(textOf(a.option("kwargsrepr")), kwargsRepr(a.s.Kwargs)),
		"origin":                cmp.Or(textOf(a.option("origin")), a.o.Origin),
		"ignore_result":         plainValue(a.optionOr("ignore_result", "null")),
		"replaced_task_nesting": plainValue(a.optionOr("replaced_task_nesting", "0")),
		"stamped_headers":       stamped,
		"stamps":                stamps,
	}
	return headers, a.mergeHeaders(headers)
}

// mergeHeaders adds the option headers, which overrides the others, as in
// Celery.
func (a *application) mergeHeaders(headers map[string]any) error {
	text := a.option("headers")
	if text == nil {
		return nil
	}
	own, err := members(text)
	if err != nil {
		return a.optionError("headers", "it is not an object")
	}
	for _, m := range own {
		if len(m.Key) > math.MaxUint8 {
			return a.optionError("headers", "a name is longer than 255 bytes")
		}
		headers[printable(m.Key)] = plainValue(m.Value)
	}
	return nil
}

// stamps returns the headers stamped_headers and stamps. A stamp without a
// value is left out.
func (a *application) stamps() (any, map[string]any) {
	stamps := map[string]any{}
	names, ok := plainValue(a.optionOr("stamped_headers", "null")).([]any)
	if !ok {
		return nil, stamps
	}
	for _, name := range names {
		key := textField(name)
		if text := a.option(key); key != "" && text != nil {
			stamps[key] = plainValue(text)
		}
	}
	return names, stamps
}

// eta returns the text of the header eta, or "" for none. The option countdown
// overrides the option eta.
func (a *application) eta() (string, error) {
	if text := a.option("countdown"); truthy(text) {
		at, err := a.secondsFromNow("countdown", text)
		if err != nil {
			return "", err
		}
		return FormatTime(at), nil
	}
	eta, err := a.moment("eta")
	return eta.text, err
}

type moment struct {
	at   time.Time
	text string
}

// moment reads an option that is a time: text, a datetime in its type wrapper,
// or seconds from now. Text is kept unchanged.
func (a *application) moment(name string) (moment, error) {
	text := a.option(name)
	if text == nil {
		return moment{}, nil
	}
	switch kindOf(text) {
	case kindNumber:
		at, err := a.secondsFromNow(name, text)
		return moment{at, FormatTime(at)}, err
	case kindObject:
		o, err := members(text)
		if kind, value, ok := wrapper(o); err == nil && ok && kind == "datetime" {
			text = value
		}
	}
	if kindOf(text) == kindString && textOf(text) == "" {
		return moment{}, nil
	}
	at, err := ParseTime(textOf(text))
	if err != nil {
		return moment{}, a.optionError(name, "it is not a time")
	}
	return moment{at, textOf(text)}, nil
}

// secondsFromNow refuses times outside of the years 1 to 9999, the limits of
// Python's datetime.
func (a *application) secondsFromNow(name string, text json.RawMessage) (time.Time, error) {
	seconds, ok := numberField(plainValue(text))
	if !ok || math.Abs(seconds) > math.MaxInt64/float64(time.Second) {
		return time.Time{}, a.optionError(name, "it is not a number of seconds")
	}
	at := a.o.Now.Add(time.Duration(seconds * float64(time.Second)))
	if y := at.UTC().Year(); y < 1 || y > 9999 {
		return time.Time{}, a.optionError(name, "it is too many seconds")
	}
	return at, nil
}

// expiration returns AMQP's property expiration: milliseconds from now, 0 for
// a time in the past.
func expiration(at, now time.Time) string {
	return strconv.FormatInt(max(0, at.Sub(now).Milliseconds()), 10)
}

// compress compresses the body if the option compression asks for zlib.
func (a *application) compress(p *Publishing) error {
	switch textOf(a.option("compression")) {
	case "zlib", "gzip", "application/x-gzip":
	default:
		return nil
	}
	var out bytes.Buffer
	z := zlib.NewWriter(&out)
	if _, err := z.Write(p.Body); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	p.Body = out.Bytes()
	p.Headers["compression"] = "application/x-gzip"
	return nil
}

// orNil returns nil, which AMQP writes as void, for "".
func orNil(text string) any {
	if text == "" {
		return nil
	}
	return text
}
