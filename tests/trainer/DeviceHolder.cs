using System.Runtime.InteropServices;
using Google.Protobuf;
using V1 = Rollout.V1;

namespace Rollout.Trainer;

/// <summary>
/// A process with memory on a device and nothing else: its test speaks the protocol. Prints the allocation and the event, and does what its
/// input says, a line at a time: "write FILE", "stop FILE", which stops the process before the device has written, "wait", or "free".
/// </summary>
internal static partial class DeviceHolder
{
    private const int SigStop = 19;

    public static void Run(string file, int ordinal)
    {
        using DeviceBucket bucket = new(ordinal, (int)new FileInfo(file).Length);
        V1.CudaIpc handles = new() { Allocations = { bucket.Allocation }, ReadyEvent = bucket.ReadyEvent };
        Console.WriteLine(Convert.ToHexString(handles.ToByteArray()));
        while (Console.ReadLine() is { } line)
        {
            string[] words = line.Split(' ', 2);
            if (words[0] == "free") bucket.Free();
            else if (words[0] == "wait") bucket.Wait();
            else bucket.Write(File.ReadAllBytes(words[1]));
            if (words[0] == "stop") _ = kill(Environment.ProcessId, SigStop);
            Console.WriteLine("done");
        }
    }

    [LibraryImport("libc")]
    private static partial int kill(int process, int signal);
}
