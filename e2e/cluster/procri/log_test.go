package procri

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// entries reads a log and returns `stream tag text` of each line, after checking its time.
func entries(t *testing.T, path string) []string {
	t.Helper()
	data, err := os.ReadFile(path)
	check(t, err)
	var found []string
	for line := range strings.Lines(string(data)) {
		at, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		_, err := time.Parse(time.RFC3339Nano, at)
		check(t, err)
		found = append(found, rest)
	}
	return found
}

func TestLogKeepsLinesWhole(t *testing.T) {
	log, err := openLog(filepath.Join(t.TempDir(), "deep", "0.log"))
	check(t, err)
	reader, writer, err := os.Pipe()
	check(t, err)
	done := make(chan struct{})
	out := newOutput(stdoutStream, log)
	var watched bytes.Buffer
	out.watch(&watched)
	go func() { out.copy(reader); close(done) }()
	long := strings.Repeat("x", logLineLimit+10)
	text := "one\ntw" + "o\n\n" + long + "\nend without newline"
	for _, part := range []string{text[:6], text[6:]} {
		_, err = writer.WriteString(part)
		check(t, err)
	}
	check(t, writer.Close())
	<-done
	check(t, log.close())
	want := []string{
		"stdout F one", "stdout F two", "stdout F ", "stdout P " + long[:logLineLimit], "stdout F " + long[logLineLimit:],
		"stdout F end without newline",
	}
	got := entries(t, log.path)
	equal(t, len(got), len(want))
	for i := range want {
		equal(t, got[i], want[i])
	}
	equal(t, watched.String(), text)
}

func TestLineOfExactlyTheLimitIsWhole(t *testing.T) {
	log, err := openLog(filepath.Join(t.TempDir(), "0.log"))
	check(t, err)
	out := newOutput(stderrStream, log)
	line := strings.Repeat("y", logLineLimit)
	out.split([]byte(line))
	out.split([]byte("\n"))
	check(t, log.close())
	got := entries(t, log.path)
	equal(t, len(got), 1)
	equal(t, got[0], "stderr F "+line)
}

func TestLogGoesOnInANewFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	log, err := openLog(path)
	check(t, err)
	check(t, log.write(time.Now(), stdoutStream, []byte("before"), false))
	check(t, os.Rename(path, path+".1"))
	check(t, log.reopen())
	check(t, log.write(time.Now(), stdoutStream, []byte("after"), false))
	check(t, log.close())
	equal(t, strings.Join(entries(t, path+".1"), "|"), "stdout F before")
	equal(t, strings.Join(entries(t, path), "|"), "stdout F after")
}
