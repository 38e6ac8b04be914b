using System.Diagnostics;
using System.Net.Sockets;

namespace Rollout.Load;

/// <summary>The cost of only moving bytes on this machine: the reference for an update's paths.</summary>
internal static class MachineCopies
{
    private const int SocketPiece = 1 << 20;

    /// <summary>Seconds to copy with one thread a core, each a contiguous part. Both buffers must have been touched before.</summary>
    public static double Memcpy(byte[] source, byte[] destination)
    {
        int cores = Environment.ProcessorCount;
        long[] begun = new long[cores];
        long[] ended = new long[cores];
        using Barrier start = new(cores);
        Thread[] others = [.. Enumerable.Range(1, cores - 1).Select(core => new Thread(() => Copy(core)))];
        foreach (Thread thread in others) thread.Start();
        Copy(0);
        foreach (Thread thread in others) thread.Join();
        return Stopwatch.GetElapsedTime(begun.Min(), ended.Max()).TotalSeconds;

        void Copy(int core)
        {
            int from = (int)((long)source.Length * core / cores);
            int to = (int)((long)source.Length * (core + 1) / cores);
            start.SignalAndWait();
            begun[core] = Stopwatch.GetTimestamp();
            source.AsSpan(from, to - from).CopyTo(destination.AsSpan(from, to - from));
            ended[core] = Stopwatch.GetTimestamp();
        }
    }

    /// <summary>Seconds from the first byte into a Unix stream socket to the last one out of it, a thread at each end.</summary>
    public static double UnixSocket(byte[] source)
    {
        DirectoryInfo folder = Directory.CreateTempSubdirectory("rollout-load-");
        try
        {
            UnixDomainSocketEndPoint endPoint = new(Path.Combine(folder.FullName, "s"));
            using Socket listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            listener.Bind(endPoint);
            listener.Listen(1);
            using Socket sender = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            sender.Connect(endPoint);
            using Socket receiver = listener.Accept();

            byte[] buffer = new byte[SocketPiece];
            long received = 0;
            long ended = 0;
            Thread receiving = new(() =>
            {
                while (receiver.Receive(buffer) is > 0 and int count) received += count;
                ended = Stopwatch.GetTimestamp();
            });
            receiving.Start();
            long begun = Stopwatch.GetTimestamp();
            for (int at = 0; at < source.Length; at += SocketPiece)
                sender.Send(source.AsSpan(at, Math.Min(SocketPiece, source.Length - at)));
            sender.Shutdown(SocketShutdown.Send);
            receiving.Join();
            if (received != source.Length)
                throw new InvalidOperationException($"{received} of {source.Length} bytes came through the socket");
            return Stopwatch.GetElapsedTime(begun, ended).TotalSeconds;
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }
}
