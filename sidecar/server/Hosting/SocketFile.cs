using System.Net.Sockets;
using System.Text;

namespace Rollout.Server.Hosting;

/// <summary>The file of a Unix socket: whether it can be created, and whether a server listens on an existing one.</summary>
internal static class SocketFile
{
    /// <summary>Longest path that Linux accepts, in bytes, without the terminating null.</summary>
    public const int MaxPathBytes = 107;

    /// <summary>Null when a server may listen there, otherwise the reason. Changes nothing.</summary>
    public static string? FindProblem(string path)
    {
        if (path.Length == 0) return "the path is empty";
        string full = Path.GetFullPath(path);
        int bytes = Encoding.UTF8.GetByteCount(full);
        if (bytes > MaxPathBytes) return $"'{full}' has {bytes} bytes; a socket's path has at most {MaxPathBytes}";
        if (Directory.Exists(full)) return $"'{full}' is a directory";
        string folder = Path.GetDirectoryName(full)!;
        if (!Directory.Exists(folder)) return $"the folder '{folder}' does not exist";
        if (!File.Exists(full)) return null;
        if (!IsSocket(full)) return $"'{full}' exists and is not a socket";
        return IsAnswered(full) ? $"another server is listening on '{full}'" : null;
    }

    /// <summary>Removes a socket that no process listens on. True when there was one.</summary>
    public static bool RemoveStale(string path)
    {
        if (!File.Exists(path) || !IsSocket(path) || IsAnswered(path)) return false;
        File.Delete(path);
        return true;
    }

    // Only a socket exists but cannot be opened in any mode (ENXIO). A pipe opened for reading and writing does not block.
    private static bool IsSocket(string path)
    {
        try
        {
            using FileStream file = new(path, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite | FileShare.Delete, bufferSize: 0);
            return false;
        }
        catch (UnauthorizedAccessException)
        {
            return false;
        }
        catch (IOException)
        {
            return true;
        }
    }

    private static bool IsAnswered(string path)
    {
        using Socket socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            socket.Connect(new UnixDomainSocketEndPoint(path));
            return true;
        }
        catch (SocketException e)
        {
            // Any error other than a refused connection (a full backlog, no permission) means that a server may be listening.
            return e.SocketErrorCode is not (SocketError.ConnectionRefused or SocketError.AddressNotAvailable);
        }
    }
}
