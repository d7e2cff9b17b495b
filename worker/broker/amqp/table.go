package amqp

import (
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"strconv"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// amqpTable converts headers or arguments to an AMQP table. Integers become 32
// bits where they fit, larger positive ones 64 bits, and all others text: only
// these have the same meaning in all versions of py-amqp
// (docs/celery.md#header-types).
func amqpTable(values map[string]any) (amqp.Table, error) {
	if values == nil {
		return nil, nil
	}
	table := make(amqp.Table, len(values))
	for key, value := range values {
		if len(key) > 255 {
			return nil, fmt.Errorf("header name %.40q... is longer than 255 bytes", key)
		}
		field, err := amqpField(value)
		if err != nil {
			return nil, fmt.Errorf("header %q: %w", key, err)
		}
		table[key] = field
	}
	return table, nil
}

func amqpField(value any) (any, error) {
	switch v := value.(type) {
	case nil, bool, string, []byte, time.Time, float32, float64, amqp.Decimal:
		return v, nil
	case int:
		return amqpInteger(int64(v)), nil
	case int8:
		return int32(v), nil
	case int16:
		return int32(v), nil
	case int32:
		return v, nil
	case int64:
		return amqpInteger(v), nil
	case uint8:
		return int32(v), nil
	case uint16:
		return int32(v), nil
	case uint32:
		return amqpInteger(int64(v)), nil
	case uint:
		return amqpUnsigned(uint64(v)), nil
	case uint64:
		return amqpUnsigned(v), nil
	case *big.Int:
		if v.IsInt64() {
			return amqpInteger(v.Int64()), nil
		}
		return v.String(), nil
	case json.Number:
		if n, err := strconv.ParseInt(v.String(), 10, 64); err == nil {
			return amqpInteger(n), nil
		}
		return v.String(), nil
	case []string:
		array := make([]any, len(v))
		for i, s := range v {
			array[i] = s
		}
		return array, nil
	case []any:
		array := make([]any, len(v))
		for i, element := range v {
			field, err := amqpField(element)
			if err != nil {
				return nil, fmt.Errorf("element %d: %w", i, err)
			}
			array[i] = field
		}
		return array, nil
	case map[string]any:
		return amqpTable(v)
	case amqp.Table:
		return amqpTable(v)
	}
	return nil, fmt.Errorf("a %T cannot be an AMQP header", value)
}

func amqpInteger(n int64) any {
	switch {
	case n >= math.MinInt32 && n <= math.MaxInt32:
		return int32(n)
	case n > 0:
		return n
	}
	return strconv.FormatInt(n, 10)
}

func amqpUnsigned(n uint64) any {
	if n <= math.MaxInt64 {
		return amqpInteger(int64(n))
	}
	return strconv.FormatUint(n, 10)
}

// decimal is a header's decimal number.
func decimal(scale uint8, value int32) any { return amqp.Decimal{Scale: scale, Value: value} }

// fieldSize returns how many bytes a field takes in a frame, including its type.
func fieldSize(value any) int {
	switch v := value.(type) {
	case nil:
		return 1
	case bool:
		return 2
	case int32, float32:
		return 5
	case int64, float64, time.Time, amqp.Decimal:
		return 9
	case string:
		return 5 + len(v)
	case []byte:
		return 5 + len(v)
	case []any:
		size := 5
		for _, element := range v {
			size += fieldSize(element)
		}
		return size
	case amqp.Table:
		size := 5
		for key, element := range v {
			size += 1 + len(key) + fieldSize(element)
		}
		return size
	}
	return 9
}
