using System.Globalization;
using Rollout.Client;
using Rollout.Engine;
using Rollout.Native;

namespace Rollout.Trainer;

/// <summary>A trainer on another device than the sidecar's: by NCCL, a step before every bucket.</summary>
internal static class RanksTrainer
{
    private const long BucketBytes = 150_000;

    public static async Task RunAsync(string[] args)
    {
        if (args[0] == "id")
        {
            Console.WriteLine(Convert.ToHexString(TensorRanks.NewId()));
            _ = Console.ReadLine(); // until it is closed
            return;
        }

        try
        {
            Console.WriteLine(await PushAsync(args[1], args[2], int.Parse(args[3], CultureInfo.InvariantCulture), args[4], args[5]));
        }
        catch (Exception e)
        {
            Console.WriteLine($"failed {e.GetType().Name}: {e.Message.ReplaceLineEndings(" ")}");
        }
    }

    private static async Task<string> PushAsync(string socket, string checkpoint, int device, string mode, string seconds)
    {
        using TensorMemory memory = TensorMemory.OnDevice(device);
        using SafetensorsFile file = SafetensorsFile.Open(checkpoint);
        using Native.DeviceBucket weights = memory.Allocate(file.DataBytes);
        List<Client.DeviceTensor> tensors = [];
        long at = 0;
        foreach (TensorInfo tensor in file.Tensors.Values.OrderBy(tensor => tensor.Offset))
        {
            byte[] bytes = new byte[tensor.Bytes];
            file.Read(tensor, 0, bytes);
            weights.Upload(at, bytes);
            tensors.Add(new Client.DeviceTensor(tensor.Name, TensorDType.BF16, tensor.Shape, weights.Pointer + (nint)at));
            at += bytes.Length;
        }

        await using RolloutClient client = RolloutClient.Connect($"unix:{socket}");
        await using WeightPublisher publisher = new(client)
        {
            Device = new CudaSender { MaxBucketBytes = BucketBytes, BeforeBroadcast = i => Step($"broadcast {i}") },
        };
        Step("ready");
        PushResult result = await publisher.PushAsync(tensors, options: new PushOptions
        {
            Mode = mode == "inplace" ? Client.UpdateMode.InPlace : Client.UpdateMode.Staged,
            Timeout = TimeSpan.FromSeconds(int.Parse(seconds, CultureInfo.InvariantCulture)),
        });
        Step("committed");
        return $"committed {result.Version} by {result.Transport}";
    }

    private static void Step(string name)
    {
        Console.WriteLine($"step {name}");
        if (Console.ReadLine() is null) Environment.Exit(1); // the test has ended
    }
}
