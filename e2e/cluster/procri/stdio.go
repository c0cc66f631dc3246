package procri

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// stdio is the standard streams of one process, as pipes or one terminal.
type stdio struct {
	// theirs go to the process: input, output and error, or the terminal alone.
	theirs []*os.File
	// input is nil if the process reads /dev/null; on a terminal input and output are the same file and failure is nil.
	input, output, failure *os.File
	terminal               bool
}

// newStdio opens the streams.
func newStdio(input, terminal bool) (*stdio, error) {
	if terminal {
		return newTerminal()
	}
	s := &stdio{}
	err := s.open(input)
	if err != nil {
		s.close()
		closeAll(s.theirs)
		return nil, err
	}
	return s, nil
}

func (s *stdio) open(input bool) error {
	if input {
		reader, writer, err := pipe()
		if err != nil {
			return err
		}
		s.theirs = append(s.theirs, reader)
		if s.input, err = pollable(writer); err != nil {
			return err
		}
	} else {
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		s.theirs = append(s.theirs, null)
	}
	for _, ours := range []**os.File{&s.output, &s.failure} {
		reader, writer, err := pipe()
		if err != nil {
			return err
		}
		s.theirs = append(s.theirs, writer)
		if *ours, err = pollable(reader); err != nil {
			return err
		}
	}
	return nil
}

// pipe returns two blocking ends, as processes expect; those of os.Pipe do not block.
func pipe() (reader, writer *os.File, err error) {
	ends := make([]int, 2)
	if err := unix.Pipe2(ends, unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("pipe: %w", err)
	}
	return os.NewFile(uintptr(ends[0]), "reader"), os.NewFile(uintptr(ends[1]), "writer"), nil
}

// pollable makes a file closable while it is being read.
func pollable(file *os.File) (*os.File, error) {
	descriptor, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err = errors.Join(err, file.Close()); err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(descriptor, true); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(descriptor), file.Name()), nil
}

// newTerminal opens a pseudo-terminal of the machine, which containers see below /dev/pts too.
func newTerminal() (*stdio, error) {
	descriptor, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	ours := os.NewFile(uintptr(descriptor), "terminal")
	err = unix.IoctlSetPointerInt(descriptor, unix.TIOCSPTLCK, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("unlock terminal: %w", err), ours.Close())
	}
	number, err := unix.IoctlGetInt(descriptor, unix.TIOCGPTN)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("name of terminal: %w", err), ours.Close())
	}
	theirs, err := unix.Open(fmt.Sprintf("/dev/pts/%d", number), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open terminal: %w", err), ours.Close())
	}
	return &stdio{
		theirs: []*os.File{os.NewFile(uintptr(theirs), "terminal")}, input: ours, output: ours, terminal: true,
	}, nil
}

// resize tells a terminal its size.
func (s *stdio) resize(width, height uint16) error {
	raw, err := s.output.SyscallConn()
	if err != nil {
		return err
	}
	var failure error
	err = raw.Control(func(descriptor uintptr) {
		failure = unix.IoctlSetWinsize(int(descriptor), unix.TIOCSWINSZ, &unix.Winsize{Col: width, Row: height})
	})
	return errors.Join(err, failure)
}

// close ends procri's side; closing twice is harmless.
func (s *stdio) close() {
	for _, file := range []*os.File{s.input, s.output, s.failure} {
		if file != nil {
			_ = file.Close() // what was not read is not wanted
		}
	}
}
