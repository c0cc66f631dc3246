package procri

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	remote "k8s.io/apimachinery/pkg/util/remotecommand"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// executors are kubectl's two ways of streaming.
func executors(t *testing.T, address string) map[string]func() remotecommand.Executor {
	t.Helper()
	target, err := url.Parse(address)
	check(t, err)
	return map[string]func() remotecommand.Executor{
		"websocket": func() remotecommand.Executor {
			executor, err := remotecommand.NewWebSocketExecutorForProtocols(
				&rest.Config{}, http.MethodGet, address, remote.StreamProtocolV4Name)
			check(t, err)
			return executor
		},
		"spdy": func() remotecommand.Executor {
			executor, err := remotecommand.NewSPDYExecutor(&rest.Config{}, http.MethodPost, target)
			check(t, err)
			return executor
		},
	}
}

func TestStreamingExec(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	id := n.run(pod, "sleep 1000", nil)
	for _, kind := range []string{"websocket", "spdy"} {
		t.Run(kind, func(t *testing.T) {
			answer, err := n.runtime.Exec(n.context(), &runtimeapi.ExecRequest{
				ContainerId: id, Cmd: []string{"sh", "-c", "head -c 50000; echo failure >&2; exit 5"}, Stdin: true, Stdout: true, Stderr: true,
			})
			check(t, err)
			var stdout, stderr bytes.Buffer
			err = executors(t, answer.Url)[kind]().StreamWithContext(n.context(), remotecommand.StreamOptions{
				Stdin: strings.NewReader(strings.Repeat("line\n", 20000)), Stdout: &stdout, Stderr: &stderr,
			})
			failure := exec.CodeExitError{}
			if !errors.As(err, &failure) || failure.Code != 5 {
				t.Fatalf("exec ended with %v", err)
			}
			equal(t, stdout.Len(), 50000)
			equal(t, stderr.String(), "failure\n")

			answer, err = n.runtime.Exec(n.context(), &runtimeapi.ExecRequest{
				ContainerId: id, Cmd: []string{"sh", "-c", "read line; test -t 0 && tty && stty size && echo $line"},
				Stdin: true, Stdout: true, Tty: true,
			})
			check(t, err)
			var terminal bytes.Buffer
			input, typist := io.Pipe()
			defer func() { check(t, typist.Close()) }()
			sizes := &terminalSize{typed: func() { _, _ = typist.Write([]byte("hello\n")) }}
			check(t, executors(t, answer.Url)[kind]().StreamWithContext(n.context(), remotecommand.StreamOptions{
				Stdin: input, Stdout: &terminal, Tty: true, TerminalSizeQueue: sizes,
			}))
			for _, part := range []string{"/dev/pts/", "33 77", "hello"} {
				if !strings.Contains(terminal.String(), part) {
					t.Errorf("%q is not in %q", part, terminal.String())
				}
			}
		})
	}
}

// terminalSize gives one size and, when it has been sent, types.
type terminalSize struct {
	asked int
	typed func()
}

func (s *terminalSize) Next() *remotecommand.TerminalSize {
	s.asked++
	switch s.asked {
	case 1:
		return &remotecommand.TerminalSize{Width: 77, Height: 33}
	case 2:
		s.typed()
		return &remotecommand.TerminalSize{Width: 77, Height: 33}
	}
	return nil
}

func TestAttach(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	id := n.run(pod, "read line; echo got $line; read line", func(c *runtimeapi.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
	answer, err := n.runtime.Attach(n.context(), &runtimeapi.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Stderr: true})
	check(t, err)
	var stdout bytes.Buffer
	check(t, executors(t, answer.Url)["spdy"]().StreamWithContext(n.context(), remotecommand.StreamOptions{
		Stdin: strings.NewReader("this\n"), Stdout: &stdout, Stderr: io.Discard,
	}))
	equal(t, stdout.String(), "got this\n")
	equal(t, n.finish(id).ExitCode, 1)
}

func TestPortForward(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	id := n.run(pod, "exec python3 -c \"$PROGRAM\"", listenerEnv)
	n.eventually("the server", func() bool {
		return n.exec(id, "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/80").ExitCode == 0
	})
	answer, err := n.runtime.PortForward(n.context(), &runtimeapi.PortForwardRequest{PodSandboxId: pod})
	check(t, err)
	target, err := url.Parse(answer.Url)
	check(t, err)
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{})
	check(t, err)
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, target)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ready := make(chan struct{})
	forwarder, err := portforward.New(dialer, []string{"0:80"}, ctx.Done(), ready, io.Discard, io.Discard)
	check(t, err)
	ended := make(chan error, 1)
	go func() { ended <- forwarder.ForwardPorts() }()
	<-ready
	ports, err := forwarder.GetPorts()
	check(t, err)
	for range 3 {
		equal(t, askLocal(t, ports[0].Local), "pong\n")
	}
	cancel()
	check(t, <-ended)
}
