package token

import (
	"errors"
	"fmt"
	"strings"

	"github.com/golang-jwt/jwt/v5"

	"kuma/internal/errs"
)

// Unverified checks that a text has the shape of a token and returns it
// without surrounding white space. It verifies nothing: kuma-dp calls it
// before it sends a token, so that a slip is told at once. The source is the
// file that the text came from, for the error; it is empty for a text that
// was given directly.
func Unverified(text, source string) (string, error) {
	trimmed := strings.TrimSpace(text)
	if err := shape(trimmed, source); err != nil {
		return "", errs.New(errs.Invalid, "dataplane token is invalid, in Kubernetes you must mount a serviceAccount token, in universal you must start your proxy with a generated token.: %w", err)
	}
	return trimmed, nil
}

func shape(text, source string) error {
	switch {
	case text == "" && source == "":
		return errors.New("token is empty")
	case text == "":
		return fmt.Errorf("token under file %s is empty", source)
	case strings.ContainsAny(text, "\r\n"):
		return errs.New(errs.Invalid, "Token shouldn't contain line breaks within the token, only at the start or end")
	case len(text) > MaxSize:
		return fmt.Errorf("token has %d bytes, the limit is %d", len(text), MaxSize)
	}
	if _, _, err := jwt.NewParser().ParseUnverified(text, jwt.MapClaims{}); err != nil {
		return errs.New(errs.Invalid, "not valid JWT token. Can't parse it.: %w", err)
	}
	return nil
}
