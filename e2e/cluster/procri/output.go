package procri

import (
	"bytes"
	"io"
	"os"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

// output carries one stream of a container's processes to the log and to whoever is attached.
type output struct {
	stream string
	log    *logFile
	// line is the beginning of a line whose end has not been read yet.
	line []byte

	mu       sync.Mutex
	watchers map[io.Writer]struct{}
}

func newOutput(stream string, log *logFile) *output {
	return &output{stream: stream, log: log, watchers: map[io.Writer]struct{}{}}
}

// copy reads until the last process has closed its end.
func (o *output) copy(from *os.File) {
	buffer := make([]byte, logLineLimit)
	for {
		count, err := from.Read(buffer)
		if count > 0 {
			o.publish(buffer[:count])
			o.split(buffer[:count])
		}
		if err != nil {
			// A pipe ends with EOF and a terminal with EIO; a deadline means that no one is waiting.
			break
		}
	}
	if len(o.line) > 0 {
		o.write(o.line, false)
		o.line = nil
	}
}

// split writes whole lines; a line longer than the limit is written in parts.
func (o *output) split(data []byte) {
	for len(data) > 0 {
		end := bytes.IndexByte(data, '\n')
		room := logLineLimit - len(o.line)
		switch {
		case end >= 0 && end <= room:
			o.write(append(o.line, data[:end]...), false)
			o.line = o.line[:0]
			data = data[end+1:]
		case len(data) > room:
			o.write(append(o.line, data[:room]...), true)
			o.line = o.line[:0]
			data = data[room:]
		default:
			o.line = append(o.line, data...)
			return
		}
	}
}

func (o *output) write(text []byte, partial bool) {
	if err := o.log.write(time.Now(), o.stream, text, partial); err != nil {
		klog.ErrorS(err, "Container output was lost", "log", o.log.path)
	}
}

func (o *output) publish(data []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for watcher := range o.watchers {
		if _, err := watcher.Write(data); err != nil {
			delete(o.watchers, watcher) // it has left
		}
	}
}

// watch copies new output to a writer until the function that it returns is called.
func (o *output) watch(writer io.Writer) (leave func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.watchers[writer] = struct{}{}
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.watchers, writer)
	}
}
