using System.Globalization;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;
using Rollout.Native;
using Rollout.Server.Commands;
using Spectre.Console;

namespace Rollout.Server.Hosting;

/// <summary>Loads a model, with a progress bar on a terminal.</summary>
internal static class ModelLoader
{
    /// <exception cref="BadInputException">The folder holds no model that can be served; says what is wrong with it.</exception>
    public static async Task<RolloutEngine> LoadAsync(ModelSource source, EngineOptions options)
    {
        bool cuda = UsesCuda(source);
        if (Console.IsErrorRedirected) return await Task.Run(() => Load(source, cuda, options, progress: null));

        IAnsiConsole console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(Console.Error) });
        return await console.Progress()
            .AutoClear(true)
            .Columns(new TaskDescriptionColumn(), new ProgressBarColumn(), new PercentageColumn(), new RemainingTimeColumn())
            .StartAsync(async bars =>
            {
                ProgressTask bar = bars.AddTask($"Loading {Markup.Escape(Path.GetFileName(source.Folder))}", maxValue: 1);
                return await Task.Run(() => Load(source, cuda, options, new BarProgress(bar)));
            });
    }

    private static RolloutEngine Load(ModelSource source, bool cuda, EngineOptions options, IProgress<double>? progress)
    {
        Backend backend = Backend(source, cuda);
        try
        {
            return RolloutEngine.Load(source.Folder, backend, options, Tokenizer(source), progress);
        }
        catch
        {
            backend.Dispose();
            throw;
        }
    }

    /// <summary>Where the device is auto and the CPU is chosen, writes the reason to standard error.</summary>
    private static bool UsesCuda(ModelSource source)
    {
        if (source.Device != "auto") return source.Device.StartsWith("cuda", StringComparison.Ordinal);
        if (CudaBackend.WhyNoDevice is not { } why) return true;
        Console.Error.WriteLine($"rollout: the CPU computes, since no GPU can be used: {why}");
        return false;
    }

    /// <exception cref="BadInputException">The device cannot be used, or does not store this format; says which.</exception>
    private static Backend Backend(ModelSource source, bool cuda)
    {
        bool stores = cuda ? source.Format is WeightFormat.BFloat16 or WeightFormat.Float32 : source.Format is not WeightFormat.Float32;
        if (!stores)
        {
            string whose = cuda ? "a GPU's" : "the CPU's";
            throw new BadInputException([$"--dtype {WeightFormats.NameOf(source.Format)} is not one of {whose} formats"]);
        }

        if (!cuda) return new CpuBackend(source.Threads, format: source.Format);
        try
        {
            byte ordinal = source.Device.Split(':') is [_, var digits] ? byte.Parse(digits, CultureInfo.InvariantCulture) : (byte)0;
            return new CudaBackend(ordinal, source.Format);
        }
        catch (CudaException e)
        {
            throw new BadInputException([e.Message]);
        }
    }

    private static Tokenizer? Tokenizer(ModelSource source) => source.Tokenizer is null ? null : new ByteTokenizer();

    // Not Progress<T>: it posts to the thread pool, and a late report would overwrite later output.
    private sealed class BarProgress(ProgressTask bar) : IProgress<double>
    {
        public void Report(double value) => bar.Value = value;
    }
}
