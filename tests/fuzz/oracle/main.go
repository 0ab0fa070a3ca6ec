// Reads bytes as Go's net/http server does, which is the one inside an Ollama server, and says which requests it saw.
//
// It reads frames from standard input (length as a 32-bit big-endian number, then the bytes of one connection) and writes
// one line of JSON for each: the requests whose handler got a whole body, in their order, and the statuses that were sent.
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
)

type request struct {
	Method string `json:"method"`
	Target string `json:"target"`
	Host   string `json:"host"`
	Body   []byte `json:"body"`
}

// memory is a connection whose peer has sent all of its bytes and then closed its side.
type memory struct {
	in     *bytes.Reader
	lock   sync.Mutex
	out    bytes.Buffer
	closed chan struct{}
	once   sync.Once
}

func (m *memory) Read(p []byte) (int, error) { return m.in.Read(p) }
func (m *memory) Write(p []byte) (int, error) {
	m.lock.Lock()
	defer m.lock.Unlock()
	return m.out.Write(p)
}
func (m *memory) Close() error                     { m.once.Do(func() { close(m.closed) }); return nil }
func (m *memory) LocalAddr() net.Addr              { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }
func (m *memory) RemoteAddr() net.Addr             { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2} }
func (m *memory) SetDeadline(time.Time) error      { return nil }
func (m *memory) SetReadDeadline(time.Time) error  { return nil }
func (m *memory) SetWriteDeadline(time.Time) error { return nil }

type listener chan net.Conn

func (l listener) Accept() (net.Conn, error) { return <-l, nil }
func (l listener) Close() error              { return nil }
func (l listener) Addr() net.Addr            { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

func statuses(raw []byte) []int {
	found := []int{}
	for _, part := range bytes.Split(raw, []byte("HTTP/1."))[1:] {
		if len(part) > 5 {
			if status, err := strconv.Atoi(string(part[2:5])); err == nil && status >= 200 {
				found = append(found, status)
			}
		}
	}
	return found
}

func main() {
	var seen []request
	handler := func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		seen = append(seen, request{r.Method, r.RequestURI, r.Host, body})
	}
	connections := make(listener)
	server := &http.Server{
		Handler: http.HandlerFunc(handler), ErrorLog: log.New(io.Discard, "", 0), DisableGeneralOptionsHandler: true,
	}
	go server.Serve(connections)
	in, out := bufio.NewReader(os.Stdin), bufio.NewWriter(os.Stdout)
	for {
		var size uint32
		if err := binary.Read(in, binary.BigEndian, &size); err != nil {
			return
		}
		frame := make([]byte, size)
		if _, err := io.ReadFull(in, frame); err != nil {
			return
		}
		seen = []request{}
		connection := &memory{in: bytes.NewReader(frame), closed: make(chan struct{})}
		connections <- connection
		<-connection.closed
		line, err := json.Marshal(map[string]any{"requests": seen, "statuses": statuses(connection.out.Bytes())})
		if err != nil {
			panic(err)
		}
		out.Write(append(line, '\n'))
		out.Flush()
	}
}
