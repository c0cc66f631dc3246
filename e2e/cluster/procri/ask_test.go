package procri

import (
	"fmt"
	"io"
	"net"
	"strconv"
	"testing"
)

func itoa(number int) string { return strconv.Itoa(number) }

// askLocal sends one line to a port of this machine and returns the answer.
func askLocal(t *testing.T, port uint16) string {
	t.Helper()
	connection, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	check(t, err)
	defer func() { check(t, connection.Close()) }()
	_, err = io.WriteString(connection, "ping\n")
	check(t, err)
	answer, err := io.ReadAll(connection)
	check(t, err)
	return string(answer)
}
