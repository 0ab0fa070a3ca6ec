// Decodes request bodies as an Ollama server does and says what it saw: the judge of router/llm_api/body_reader.py.
//
// It reads frames from standard input (path length, body length as 32-bit big-endian numbers, then both) and writes one
// line of JSON for each. The structs hold the fields that matter, with the types that they have in api/types.go,
// openai/openai.go and anthropic/anthropic.go; the decoder is the one that gin's ShouldBindJSON uses.
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
)

// Duration takes what api.Duration takes, and keeps it as it was given.
type Duration struct{ given any }

func (d *Duration) UnmarshalJSON(b []byte) error {
	if err := json.Unmarshal(b, &d.given); err != nil {
		return err
	}
	switch d.given.(type) {
	case float64, string:
		return nil
	}
	return errors.New("unsupported type")
}

// Message keeps nothing: only the length of a list of them matters.
type Message struct{}

func (m *Message) UnmarshalJSON(b []byte) error { return nil }

type generateRequest struct {
	Model     string         `json:"model"`
	Prompt    string         `json:"prompt"`
	Suffix    string         `json:"suffix"`
	Stream    *bool          `json:"stream,omitempty"`
	KeepAlive *Duration      `json:"keep_alive,omitempty"`
	Options   map[string]any `json:"options"`
}

type chatRequest struct {
	Model     string         `json:"model"`
	Messages  []Message      `json:"messages"`
	Stream    *bool          `json:"stream,omitempty"`
	KeepAlive *Duration      `json:"keep_alive,omitempty"`
	Options   map[string]any `json:"options"`
}

type embeddingRequest struct {
	Model     string         `json:"model"`
	Prompt    string         `json:"prompt"`
	KeepAlive *Duration      `json:"keep_alive,omitempty"`
	Options   map[string]any `json:"options"`
}

type embedRequest struct {
	Model     string         `json:"model"`
	Input     any            `json:"input"`
	KeepAlive *Duration      `json:"keep_alive,omitempty"`
	Options   map[string]any `json:"options"`
}

type namedRequest struct {
	Model  string `json:"model"`
	Name   string `json:"name"`
	Stream *bool  `json:"stream,omitempty"`
}

type aboutRequest struct {
	Model string `json:"model"`
	Name  string `json:"name"`
}

type copyRequest struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
}

type openaiChatRequest struct {
	Model     string    `json:"model"`
	Messages  []Message `json:"messages"`
	Stream    bool      `json:"stream"`
	MaxTokens *int      `json:"max_tokens"`
	// Not a field of Ollama's: the router takes it as a hint.
	MaxCompletionTokens json.RawMessage `json:"max_completion_tokens"`
}

type openaiCompletionRequest struct {
	Model     string `json:"model"`
	Prompt    string `json:"prompt"`
	Stream    bool   `json:"stream"`
	MaxTokens *int   `json:"max_tokens"`
}

type openaiEmbedRequest struct {
	Model string `json:"model"`
	Input any    `json:"input"`
}

type responsesRequest struct {
	Model           string `json:"model"`
	Stream          *bool  `json:"stream,omitempty"`
	MaxOutputTokens *int   `json:"max_output_tokens,omitempty"`
}

type seen struct {
	Ok        bool           `json:"ok"`
	Error     string         `json:"error,omitempty"`
	Model     string         `json:"model"`
	Stream    *bool          `json:"stream"`
	KeepAlive any            `json:"keep_alive"`
	Options   map[string]any `json:"options"`
	MaxTokens *int           `json:"max_tokens"`
	LoadOnly  bool           `json:"load_only"`
	Hinted    bool           `json:"hinted"`
}

func given(d *Duration) any {
	if d == nil {
		return nil
	}
	return d.given
}

func or(first, second string) string {
	if first != "" {
		return first
	}
	return second
}

// emptyInput is EmbedHandler's: no text and no list with an element.
func emptyInput(input any, stringCounts bool) bool {
	switch value := input.(type) {
	case string:
		return stringCounts && value == ""
	case []any:
		return len(value) == 0
	}
	return stringCounts && input == nil
}

func decode(path string, body []byte) (result seen, err error) {
	decoder := json.NewDecoder(bytes.NewReader(body))
	switch path {
	case "/api/embeddings":
		var r embeddingRequest
		err = decoder.Decode(&r)
		result = seen{Model: r.Model, KeepAlive: given(r.KeepAlive), Options: r.Options, LoadOnly: r.Prompt == ""}
	case "/api/generate":
		var r generateRequest
		err = decoder.Decode(&r)
		result = seen{Model: r.Model, Stream: r.Stream, KeepAlive: given(r.KeepAlive), Options: r.Options, LoadOnly: r.Prompt == ""}
	case "/api/chat":
		var r chatRequest
		err = decoder.Decode(&r)
		result = seen{Model: r.Model, Stream: r.Stream, KeepAlive: given(r.KeepAlive), Options: r.Options, LoadOnly: len(r.Messages) == 0}
	case "/api/embed":
		var r embedRequest
		err = decoder.Decode(&r)
		result = seen{Model: r.Model, KeepAlive: given(r.KeepAlive), Options: r.Options, LoadOnly: emptyInput(r.Input, true)}
	case "/api/pull", "/api/push", "/api/create":
		var r namedRequest
		err = decoder.Decode(&r)
		result = seen{Model: or(r.Model, r.Name), Stream: r.Stream}
	case "/api/show", "/api/delete":
		var r aboutRequest
		err = decoder.Decode(&r)
		result = seen{Model: or(r.Model, r.Name)}
	case "/api/copy":
		var r copyRequest
		err = decoder.Decode(&r)
		result = seen{Model: r.Source}
	case "/v1/chat/completions", "/v1/messages":
		var r openaiChatRequest
		err = decoder.Decode(&r)
		result = seen{Model: r.Model, Stream: &r.Stream, MaxTokens: r.MaxTokens, Hinted: r.MaxCompletionTokens != nil}
	case "/v1/completions":
		var r openaiCompletionRequest
		err = decoder.Decode(&r)
		result = seen{Model: r.Model, Stream: &r.Stream, MaxTokens: r.MaxTokens, LoadOnly: r.Prompt == ""}
	case "/v1/embeddings":
		var r openaiEmbedRequest
		err = decoder.Decode(&r)
		result = seen{Model: r.Model, LoadOnly: emptyInput(r.Input, false)}
	case "/v1/responses":
		var r responsesRequest
		err = decoder.Decode(&r)
		result = seen{Model: r.Model, Stream: r.Stream, MaxTokens: r.MaxOutputTokens}
	default:
		err = errors.New("no such path: " + path)
	}
	return result, err
}

func main() {
	in := bufio.NewReader(os.Stdin)
	out := bufio.NewWriter(os.Stdout)
	for {
		var sizes [2]uint32
		if err := binary.Read(in, binary.BigEndian, &sizes); err != nil {
			return
		}
		frame := make([]byte, sizes[0]+sizes[1])
		if _, err := io.ReadFull(in, frame); err != nil {
			return
		}
		result, err := decode(string(frame[:sizes[0]]), frame[sizes[0]:])
		result.Ok = err == nil
		if err != nil {
			result = seen{Error: err.Error()}
		}
		line, err := json.Marshal(result)
		if err != nil {
			panic(err)
		}
		out.Write(append(line, '\n'))
		out.Flush()
	}
}
