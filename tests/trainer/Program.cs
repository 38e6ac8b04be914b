using System.Globalization;
using System.IO.Hashing;
using System.Net.Sockets;
using System.Security.Cryptography;
using Google.Protobuf;
using Grpc.Core;
using Grpc.Net.Client;
using Rollout.Client;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Trainer;
using V1 = Rollout.V1;

// A trainer that a test can kill at a chosen step of an update. At every step it prints a line and waits for one; its last line says how
// the update ended.
//   trainer push    SOCKET CHECKPOINT (inline|shm|file|ipc) (staged|inplace) MESSAGES   the protocol by hand, in so many messages
//   trainer publish SOCKET CHECKPOINT (inline|shm|file) (staged|inplace) SECONDS [FOLDER]   by the client library, with this timeout
//   trainer hold FILE DEVICE   see DeviceHolder
//   trainer ranks SOCKET CHECKPOINT DEVICE (staged|inplace) SECONDS   by the client library, from this simulated device
//   trainer id   prints an ncclUniqueId, and never joins
if (args[0] is "ranks" or "id")
{
    await RanksTrainer.RunAsync(args);
    return;
}

if (args[0] == "hold")
{
    DeviceHolder.Run(args[1], int.Parse(args[2], CultureInfo.InvariantCulture));
    return;
}

string socket = args[1];
string checkpoint = args[2];
string transport = args[3];
bool inPlace = args[4] == "inplace";
int number = int.Parse(args[5], CultureInfo.InvariantCulture);
using SafetensorsFile file = SafetensorsFile.Open(checkpoint);
TensorInfo[] tensors = [.. file.Tensors.Values.OrderBy(tensor => tensor.Offset)];
try
{
    Console.WriteLine(args[0] == "push" ? await PushAsync() : await PublishAsync());
}
catch (Exception e)
{
    string outcome = e is WeightUpdateFailedException failed ? $" {failed.Outcome}" : "";
    Console.WriteLine($"failed {e.GetType().Name}{outcome}: {e.Message.ReplaceLineEndings(" ")}");
}

return;

static void Step(string name)
{
    Console.WriteLine($"step {name}");
    if (Console.ReadLine() is null) Environment.Exit(1); // the test has ended
}

async Task<string> PublishAsync()
{
    await using RolloutClient client = RolloutClient.Connect($"unix:{socket}");
    // A ring, so that tensors are copied while others have been read.
    await using WeightPublisher publisher = new(client) { MaxSharedMemoryBytes = 64 << 10 };
    int copied = 0;
    TensorSource[] sources = [.. tensors.Select(tensor => new TensorSource(tensor.Name, TensorDType.BF16, tensor.Shape,
        (offset, destination) =>
        {
            Step($"copy {copied++}");
            file.Read(tensor, offset, destination);
        }))];
    PushResult result = await publisher.PushAsync(sources, options: new PushOptions
    {
        Transport = transport switch { "inline" => PushTransport.Inline, "shm" => PushTransport.SharedMemory, _ => PushTransport.File },
        Mode = inPlace ? Rollout.Client.UpdateMode.InPlace : Rollout.Client.UpdateMode.Staged,
        Timeout = TimeSpan.FromSeconds(number),
        Folder = args.Length > 6 ? args[6] : null,
    });
    return $"committed {result.Version}";
}

async Task<string> PushAsync()
{
    byte[] payload = new byte[file.DataBytes];
    V1.UpdateMode mode = inPlace ? V1.UpdateMode.InPlace : V1.UpdateMode.Staged;
    V1.BeginUpdate begin = new() { PayloadBytes = (ulong)payload.Length, Mode = mode, Owner = "trainer" };
    XxHash128 digests = new();
    foreach (TensorInfo tensor in tensors)
    {
        int offset = (int)(tensor.Offset - file.DataStart);
        file.Read(tensor, 0, payload.AsSpan(offset, (int)tensor.Bytes));
        digests.Append(TensorDigest.Of(payload.AsSpan(offset, (int)tensor.Bytes)));
        begin.Manifest.Add(new V1.ManifestTensor { Name = tensor.Name, Dtype = V1.TensorDType.Bf16, Offset = (ulong)offset });
        begin.Manifest[^1].Shape.Add(tensor.Shape.Select(dimension => (ulong)dimension));
    }

    using GrpcChannel channel = Open();
    begin.BaseVersion = (await new V1.ControlService.ControlServiceClient(channel).StatusAsync(new V1.StatusRequest())).Version;
    begin.NewVersion = begin.BaseVersion + 1;
    using FileStream? shm = transport == "shm" ? SharedMemory(payload) : null;
    using DeviceBucket? bucket = transport == "ipc" ? new DeviceBucket(0, payload.Length) : null;
    bucket?.Write(payload);
    using AsyncDuplexStreamingCall<V1.UpdateRequest, V1.UpdateReply> call = new V1.WeightsService.WeightsServiceClient(channel).Update();
    Step("opened");
    await call.RequestStream.WriteAsync(new V1.UpdateRequest { Begin = begin });
    await RepliedAsync(V1.UpdateReply.StepOneofCase.Ready);
    Step("begun");
    int messages = transport == "file" ? 1 : number;
    for (int i = 0; i < messages; i++)
    {
        int from = Border((long)payload.Length * i / messages);
        int length = Border((long)payload.Length * (i + 1) / messages) - from;
        await call.RequestStream.WriteAsync(transport switch
        {
            "inline" => new V1.UpdateRequest
            {
                Chunk = new V1.Chunk { Offset = (ulong)from, Data = ByteString.CopyFrom(payload, from, length) },
            },
            "shm" => new V1.UpdateRequest
            {
                SharedMemory = new V1.SharedMemory
                {
                    Path = shm!.Name,
                    Offset = (ulong)from,
                    PayloadOffset = (ulong)from,
                    Bytes = (ulong)length,
                },
            },
            "ipc" => new V1.UpdateRequest
            {
                CudaIpc = new V1.CudaIpc
                {
                    Allocations = { bucket!.Allocation },
                    Ranges =
                    {
                        new V1.CudaRange { Offset = DeviceBucket.Offset + (ulong)from, PayloadOffset = (ulong)from, Bytes = (ulong)length },
                    },
                    ReadyEvent = bucket.ReadyEvent,
                },
            },
            _ => new V1.UpdateRequest { File = new V1.CheckpointFile { Path = checkpoint } },
        });
        // Chunks are answered when all have come, everything else one by one.
        if (transport != "inline" || i == messages - 1) await RepliedAsync(V1.UpdateReply.StepOneofCase.Progress);
        Step($"sent {i}");
    }

    V1.Commit commit = new() { Digest = ByteString.CopyFrom(digests.GetCurrentHash()) };
    await call.RequestStream.WriteAsync(new V1.UpdateRequest { Commit = commit });
    Step("committing");
    V1.UpdateReply end = await RepliedAsync(V1.UpdateReply.StepOneofCase.Committed);
    Step("committed");
    return $"committed {end.Committed.Version}";

    // Parts in device memory end with a tensor.
    int Border(long at) => transport != "ipc" || at == payload.Length ? (int)at
        : (int)(tensors.First(tensor => tensor.Offset - file.DataStart + tensor.Bytes > at).Offset - file.DataStart);

    async Task<V1.UpdateReply> RepliedAsync(V1.UpdateReply.StepOneofCase wanted)
    {
        if (!await call.ResponseStream.MoveNext(default)) throw new InvalidOperationException("the server ended the call");
        V1.UpdateReply reply = call.ResponseStream.Current;
        return reply.StepCase == wanted ? reply : throw new InvalidOperationException($"expected {wanted}, got {reply}");
    }
}

// Named as the client library names its own, which removes what a killed trainer left.
static FileStream SharedMemory(byte[] payload)
{
    string random = Convert.ToHexStringLower(RandomNumberGenerator.GetBytes(8));
    FileStream shm = new($"/dev/shm/rollout-{Environment.ProcessId}-{random}", new FileStreamOptions
    {
        Mode = FileMode.CreateNew,
        Access = FileAccess.ReadWrite,
        Share = FileShare.ReadWrite | FileShare.Delete,
        BufferSize = 0,
        Options = FileOptions.DeleteOnClose,
    });
    shm.Write(payload);
    return shm;
}

GrpcChannel Open() => GrpcChannel.ForAddress("http://localhost", new GrpcChannelOptions
{
    HttpHandler = new SocketsHttpHandler
    {
        ConnectCallback = async (_, cancellation) =>
            await V1.SidecarSocket.ConnectAsync(new UnixDomainSocketEndPoint(socket), cancellation),
    },
});
