package githubtest

import "net/http"

// serveAPI answers for the REST API.
func (s *Server) serveAPI(w http.ResponseWriter, r *http.Request) {
	http.Error(w, `{"message":"Not Found"}`, http.StatusNotFound)
}
