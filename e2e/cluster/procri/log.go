package procri

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// logLineLimit is the length in bytes from which a line is written in parts, as other runtimes do.
const logLineLimit = 16 << 10

// Stream names in log files.
const (
	stdoutStream = "stdout"
	stderrStream = "stderr"
)

// logFile is a container's log in CRI's format: `time stream tag text`, with tag F for the end of a line and P for a part before it.
type logFile struct {
	path string
	mu   sync.Mutex
	file *os.File
}

func openLog(path string) (*logFile, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	l := &logFile{path: path}
	return l, l.reopen()
}

// reopen continues in a new file after the old one was moved away.
func (l *logFile) reopen() error {
	file, err := os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	old := l.file
	l.file = file
	if old != nil {
		return old.Close()
	}
	return nil
}

// write adds one entry.
func (l *logFile) write(at time.Time, stream string, text []byte, partial bool) error {
	tag := "F"
	if partial {
		tag = "P"
	}
	entry := make([]byte, 0, len(text)+64)
	entry = fmt.Appendf(entry, "%s %s %s ", at.UTC().Format(time.RFC3339Nano), stream, tag)
	entry = append(append(entry, text...), '\n')
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := l.file.Write(entry)
	return err
}

func (l *logFile) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file.Close()
}
