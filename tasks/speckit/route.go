package speckit

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"strconv"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Headers of the messages of submit and publish.
const (
	headerAffinity = "codex-affinity"
	headerQueue    = "codex-queue"
)

// codexQueues are the queues to which submit and publish go
// (docs/spec-workflow.md#queues).
type codexQueues struct {
	// fixed is the one queue that is used instead of shards, "" for none.
	fixed string
	// shards counts the queues codex-0, codex-1 and so on.
	shards int
}

// shard returns the queue of an affinity key and the number of its shard.
func (q codexQueues) shard(key string) (queue string, index int) {
	if q.fixed != "" {
		return q.fixed, 0
	}
	sum := sha256.Sum256([]byte(key))
	index = int(binary.BigEndian.Uint64(sum[:8]) % uint64(q.shards))
	return "codex-" + strconv.Itoa(index), index
}

// names are the queues, the fixed one first.
func (q codexQueues) names() []string {
	var list []string
	if q.fixed != "" {
		list = append(list, q.fixed)
	}
	for i := range q.shards {
		list = append(list, "codex-"+strconv.Itoa(i))
	}
	return list
}

// affinityKey returns the key by which tasks of the same work go to the same
// queue, or "" if the context has nothing to make one from.
func affinityKey(context *object, repository string) string {
	if key := pythonText(context, "codex_affinity_key"); key != "" {
		return key
	}
	if own := pythonText(context, "repository"); own != "" {
		repository = own
	}
	parts := []string{repository, pythonText(context, "feature_key")}
	if task := context.inner("task"); task != nil {
		parts = append(parts, pythonText(task, "taskId"))
	}
	var known []string
	for _, part := range parts {
		if part != "" {
			known = append(known, strings.TrimSpace(part))
		}
	}
	if len(known) == 0 {
		return pythonText(context, "run_id")
	}
	return strings.Join(known, "|")
}

// pythonText returns a value as Python's str() does, "" for one that is false.
func pythonText(o *object, key string) string {
	if text := o.text(key); text != "" || !o.truthy(key) {
		return text
	}
	return string(bytes.TrimSpace(o.raw(key)))
}

// prepare does what MoonMind's task class does when it publishes submit or publish:
// it adds the routing to the context and to the headers, and chooses the queue.
func (s *Speckit) prepare(signature protocol.Signature, args []json.RawMessage) (protocol.Prepared, error) {
	prepared := protocol.Prepared{Args: args}
	var own struct {
		Queue    string `json:"codex-queue"`
		Affinity string `json:"codex-affinity"`
	}
	if text := signature.Option("headers"); text != nil {
		_ = json.Unmarshal(text, &own) // Apply reports headers that are no object
	}
	if len(args) > 0 {
		if context, err := parseObject(args[0]); err == nil {
			key := affinityKey(context, s.config.Repository)
			queue, index := s.queues.shard(key)
			if q := pythonText(context, "codex_queue"); q != "" {
				queue = q
			} else if own.Queue != "" {
				queue = own.Queue
			}
			context.setDefault("codex_affinity_key", key)
			context.setDefault("codex_queue", queue)
			context.setDefault("codex_shard_index", index)
			prepared.Args = append([]json.RawMessage{context.compact()}, args[1:]...)
			prepared.Headers = map[string]string{headerAffinity: key, headerQueue: queue}
			prepared.Queue = queue
			return prepared, nil
		}
	}
	switch {
	case own.Queue != "":
		prepared.Queue = own.Queue
	case own.Affinity != "":
		prepared.Queue, _ = s.queues.shard(own.Affinity)
	}
	return prepared, nil
}
