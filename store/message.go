package store

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// How the values of an AMQP table are stored in a json column: nil, booleans, texts,
// 32-bit integers, arrays and tables as such in JSON, so that an operator can read
// them; every other kind as an object with one member, whose name is "#" and the
// kind. A table that has such a name itself, or one that is not UTF-8, is stored as
// pairs.

// encodeTable encodes a table of a [protocol.Delivery]. decodeTable returns every
// AMQP value unchanged, except decimals, which become texts.
func encodeTable(table map[string]any) ([]byte, error) {
	return json.Marshal(taggedValue(table))
}

func tagged(kind string, value any) map[string]any { return map[string]any{"#" + kind: value} }

func taggedValue(value any) any {
	switch v := value.(type) {
	case nil, bool, int32:
		return v
	case string:
		if utf8.ValidString(v) {
			return v
		}
		return tagged("text", []byte(v))
	case []byte:
		return tagged("bytes", v)
	case int8:
		return tagged("int8", strconv.Itoa(int(v)))
	case uint8:
		return tagged("uint8", strconv.Itoa(int(v)))
	case int16:
		return tagged("int16", strconv.Itoa(int(v)))
	case uint16:
		return tagged("uint16", strconv.Itoa(int(v)))
	case uint32:
		return tagged("uint32", strconv.FormatUint(uint64(v), 10))
	case int:
		return tagged("int64", strconv.FormatInt(int64(v), 10))
	case int64:
		return tagged("int64", strconv.FormatInt(v, 10))
	case uint64:
		return tagged("uint64", strconv.FormatUint(v, 10))
	case float32:
		return tagged("float32", strconv.FormatFloat(float64(v), 'g', -1, 32))
	case float64:
		return tagged("float64", strconv.FormatFloat(v, 'g', -1, 64))
	case time.Time:
		return tagged("time", v.UTC().Format(time.RFC3339Nano))
	case []any:
		list := make([]any, len(v))
		for i := range v {
			list[i] = taggedValue(v[i])
		}
		return list
	case map[string]any:
		if v == nil {
			return tagged("table", nil)
		}
		plain := map[string]any{}
		for key, element := range v {
			if strings.HasPrefix(key, "#") || !utf8.ValidString(key) {
				return tagged("table", taggedPairs(v))
			}
			plain[key] = taggedValue(element)
		}
		return plain
	}
	return strings.ToValidUTF8(fmt.Sprint(value), "\uFFFD")
}

func taggedPairs(table map[string]any) []any {
	pairs := []any{}
	for _, key := range slices.Sorted(maps.Keys(table)) {
		pairs = append(pairs, []any{[]byte(key), taggedValue(table[key])})
	}
	return pairs
}

// decodeTable decodes the text of encodeTable.
func decodeTable(text []byte) (map[string]any, error) {
	decoder := json.NewDecoder(strings.NewReader(string(text)))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		return nil, err
	}
	plain, err := untagged(value)
	if err != nil {
		return nil, err
	}
	table, isTable := plain.(map[string]any)
	if !isTable {
		return nil, fmt.Errorf("a %T is no table", plain)
	}
	return table, nil
}

func untagged(value any) (any, error) {
	switch v := value.(type) {
	case json.Number:
		n, err := strconv.ParseInt(v.String(), 10, 32)
		return int32(n), err
	case []any:
		for i := range v {
			var err error
			if v[i], err = untagged(v[i]); err != nil {
				return nil, err
			}
		}
		return v, nil
	case map[string]any:
		if len(v) == 1 {
			for key, element := range v {
				if kind, found := strings.CutPrefix(key, "#"); found {
					return untaggedKind(kind, element)
				}
			}
		}
		for key := range v {
			var err error
			if v[key], err = untagged(v[key]); err != nil {
				return nil, err
			}
		}
		return v, nil
	}
	return value, nil
}

func untaggedKind(kind string, value any) (any, error) {
	if kind == "table" {
		return untaggedTable(value)
	}
	text, _ := value.(string)
	signed := func(bits int) (int64, error) { return strconv.ParseInt(text, 10, bits) }
	unsigned := func(bits int) (uint64, error) { return strconv.ParseUint(text, 10, bits) }
	switch kind {
	case "text":
		data, err := base64.StdEncoding.DecodeString(text)
		return string(data), err
	case "bytes":
		data, err := base64.StdEncoding.DecodeString(text)
		return data, err
	case "int8":
		n, err := signed(8)
		return int8(n), err
	case "int16":
		n, err := signed(16)
		return int16(n), err
	case "int64":
		n, err := signed(64)
		return n, err
	case "uint8":
		n, err := unsigned(8)
		return uint8(n), err
	case "uint16":
		n, err := unsigned(16)
		return uint16(n), err
	case "uint32":
		n, err := unsigned(32)
		return uint32(n), err
	case "uint64":
		n, err := unsigned(64)
		return n, err
	case "float32":
		n, err := strconv.ParseFloat(text, 32)
		return float32(n), err
	case "float64":
		n, err := strconv.ParseFloat(text, 64)
		return n, err
	case "time":
		return time.Parse(time.RFC3339Nano, text)
	}
	return nil, fmt.Errorf("unknown kind of value %q", kind)
}

func untaggedTable(value any) (any, error) {
	if value == nil {
		return map[string]any(nil), nil
	}
	pairs, _ := value.([]any)
	table := map[string]any{}
	for _, pair := range pairs {
		both, _ := pair.([]any)
		if len(both) != 2 {
			return nil, fmt.Errorf("a table has an entry that is no pair")
		}
		text, _ := both[0].(string)
		key, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, err
		}
		if table[string(key)], err = untagged(both[1]); err != nil {
			return nil, err
		}
	}
	return table, nil
}

// The names of properties in the column. Absent properties are left out.
const (
	propertyContentType     = "content_type"
	propertyContentEncoding = "content_encoding"
	propertyDeliveryMode    = "delivery_mode"
	propertyPriority        = "priority"
	propertyCorrelationID   = "correlation_id"
	propertyReplyTo         = "reply_to"
	propertyExpiration      = "expiration"
	propertyMessageID       = "message_id"
	propertyType            = "type"
	propertyAppID           = "app_id"
	propertyTimestamp       = "timestamp"
)

func encodeProperties(p protocol.Properties) ([]byte, error) {
	table := map[string]any{}
	for name, text := range map[string]string{
		propertyContentType: p.ContentType, propertyContentEncoding: p.ContentEncoding, propertyCorrelationID: p.CorrelationID,
		propertyReplyTo: p.ReplyTo, propertyExpiration: p.Expiration,
		propertyMessageID: p.MessageID, propertyType: p.Type, propertyAppID: p.AppID,
	} {
		if text != "" {
			table[name] = text
		}
	}
	if p.DeliveryMode != 0 {
		table[propertyDeliveryMode] = int32(p.DeliveryMode)
	}
	if p.Priority != nil {
		table[propertyPriority] = int32(*p.Priority)
	}
	if !p.Timestamp.IsZero() {
		table[propertyTimestamp] = p.Timestamp
	}
	return encodeTable(table)
}

func decodeProperties(text []byte) (protocol.Properties, error) {
	table, err := decodeTable(text)
	if err != nil {
		return protocol.Properties{}, err
	}
	property := func(name string) string {
		text, _ := table[name].(string)
		return text
	}
	p := protocol.Properties{
		ContentType: property(propertyContentType), ContentEncoding: property(propertyContentEncoding), CorrelationID: property(propertyCorrelationID),
		ReplyTo: property(propertyReplyTo), Expiration: property(propertyExpiration),
		MessageID: property(propertyMessageID), Type: property(propertyType), AppID: property(propertyAppID),
	}
	p.Timestamp, _ = table[propertyTimestamp].(time.Time)
	if mode, given := table[propertyDeliveryMode].(int32); given {
		p.DeliveryMode = uint8(mode)
	}
	if n, given := table[propertyPriority].(int32); given {
		priority := uint8(n)
		p.Priority = &priority
	}
	return p, nil
}
